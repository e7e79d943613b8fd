package limiter

import (
	"fmt"
	"testing"
	"time"
	_ "time/tzdata" // the machine may have none
)

func calendar(t testing.TB, unit Unit, zone, starts string) Calendar {
	t.Helper()
	var day time.Time
	if starts != "" {
		var err error
		if day, err = time.Parse(time.DateOnly, starts); err != nil {
			t.Fatal(err)
		}
	}
	c, err := NewCalendar(unit, zone, day)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCalendarWindows(t *testing.T) {
	for _, tt := range []struct {
		unit                        Unit
		zone, starts                string
		at, from, to, fromSays, len string // RFC 3339; fromSays is what the zone's clock shows at from
	}{
		{Hour, "", "", "2026-03-29T01:59:59Z", "2026-03-29T01:00:00Z", "2026-03-29T02:00:00Z", "01:00", "1h"},
		{Hour, "Asia/Kolkata", "", "2026-03-29T01:59:59Z", "2026-03-29T01:30:00Z", "2026-03-29T02:30:00Z", "07:00", "1h"},
		{Hour, "Asia/Kathmandu", "", "2026-03-29T01:14:59Z", "2026-03-29T00:15:00Z", "2026-03-29T01:15:00Z", "06:00", "1h"},
		// Berlin's clocks: 02:00 to 03:00 in spring, 03:00 back to 02:00 in autumn.
		{Hour, "Europe/Berlin", "", "2026-03-29T01:00:00Z", "2026-03-29T01:00:00Z", "2026-03-29T02:00:00Z", "03:00", "1h"},
		{Hour, "Europe/Berlin", "", "2026-10-25T00:30:00Z", "2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z", "02:00", "1h"},
		{Hour, "Europe/Berlin", "", "2026-10-25T01:30:00Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z", "02:00", "1h"},
		// Lord Howe's: 02:00 to 02:30 in October, 02:00 back to 01:30 in April.
		{Hour, "Australia/Lord_Howe", "", "2026-10-03T15:45:00Z", "2026-10-03T14:30:00Z", "2026-10-03T16:00:00Z", "01:00", "1h30m"},
		{Hour, "Australia/Lord_Howe", "", "2026-04-04T15:15:00Z", "2026-04-04T14:00:00Z", "2026-04-04T15:30:00Z", "01:00", "1h30m"},
		{Day, "Europe/Berlin", "", "2026-03-29T12:00:00Z", "2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z", "00:00", "23h"},
		{Day, "Europe/Berlin", "", "2026-10-25T12:00:00Z", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z", "00:00", "25h"},
		{Day, "America/New_York", "", "2026-03-08T12:00:00Z", "2026-03-08T05:00:00Z", "2026-03-09T04:00:00Z", "00:00", "23h"},
		{Day, "Australia/Lord_Howe", "", "2026-10-04T00:00:00Z", "2026-10-03T13:30:00Z", "2026-10-04T13:00:00Z", "00:00", "23h30m"},
		// Cairo has no midnight on 2026-04-24; Havana has two on 2026-11-01.
		{Day, "Africa/Cairo", "", "2026-04-24T12:00:00Z", "2026-04-23T22:00:00Z", "2026-04-24T21:00:00Z", "01:00", "23h"},
		{Day, "America/Havana", "", "2026-11-01T05:30:00Z", "2026-11-01T04:00:00Z", "2026-11-02T05:00:00Z", "00:00", "25h"},
		// St John's went from 00:01 back to 23:01 of the day before, until 2011.
		{Day, "America/St_Johns", "", "2010-11-07T03:00:00Z", "2010-11-07T02:30:00Z", "2010-11-08T03:30:00Z", "00:00", "25h"},
		{Day, "America/St_Johns", "", "2010-11-07T02:29:59Z", "2010-11-06T02:30:00Z", "2010-11-07T02:30:00Z", "00:00", "24h"},
		// Samoa had no 2011-12-30.
		{Day, "Pacific/Apia", "", "2011-12-30T09:59:59Z", "2011-12-29T10:00:00Z", "2011-12-30T10:00:00Z", "00:00", "24h"},
		{Day, "Pacific/Apia", "", "2011-12-30T10:00:00Z", "2011-12-30T10:00:00Z", "2011-12-31T10:00:00Z", "00:00", "24h"},
		{Week, "", "", "2026-11-29T23:59:59Z", "2026-11-23T00:00:00Z", "2026-11-30T00:00:00Z", "00:00", "168h"},
		{Week, "", "", "1969-12-31T00:00:00Z", "1969-12-29T00:00:00Z", "1970-01-05T00:00:00Z", "00:00", "168h"},
		{Week, "", "2026-11-25", "2026-11-24T23:59:59Z", "2026-11-18T00:00:00Z", "2026-11-25T00:00:00Z", "00:00", "168h"},
		{Week, "Europe/Berlin", "", "2026-10-25T12:00:00Z", "2026-10-18T22:00:00Z", "2026-10-25T23:00:00Z", "00:00", "169h"},
		{Month, "", "", "2028-02-29T23:59:59Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z", "00:00", "696h"},
		{Month, "", "", "2100-02-28T23:59:59Z", "2100-02-01T00:00:00Z", "2100-03-01T00:00:00Z", "00:00", "672h"},
		{Month, "", "2026-01-14", "2026-03-13T23:59:59Z", "2026-02-14T00:00:00Z", "2026-03-14T00:00:00Z", "00:00", "672h"},
		{Month, "", "2026-01-31", "2026-02-28T00:00:00Z", "2026-02-28T00:00:00Z", "2026-03-31T00:00:00Z", "00:00", "744h"},
		{Month, "", "2026-01-31", "2028-02-28T23:59:59Z", "2028-01-31T00:00:00Z", "2028-02-29T00:00:00Z", "00:00", "696h"},
		{Month, "", "2026-01-31", "2026-01-30T23:59:59Z", "2025-12-31T00:00:00Z", "2026-01-31T00:00:00Z", "00:00", "744h"},
		{Year, "", "", "2028-12-31T23:59:59Z", "2028-01-01T00:00:00Z", "2029-01-01T00:00:00Z", "00:00", "8784h"},
		{Year, "", "2024-02-29", "2026-02-28T00:00:00Z", "2026-02-28T00:00:00Z", "2027-02-28T00:00:00Z", "00:00", "8760h"},
		{Year, "", "2024-02-29", "2028-02-28T23:59:59Z", "2027-02-28T00:00:00Z", "2028-02-29T00:00:00Z", "00:00", "8784h"},
		{Year, "Asia/Tokyo", "2020-04-01", "2026-03-31T14:59:59Z", "2025-03-31T15:00:00Z", "2026-03-31T15:00:00Z", "00:00", "8760h"},
	} {
		t.Run(fmt.Sprint(tt.unit, tt.zone, tt.starts, tt.at), func(t *testing.T) {
			c := calendar(t, tt.unit, tt.zone, tt.starts)
			at, err := time.Parse(time.RFC3339, tt.at)
			if err != nil {
				t.Fatal(err)
			}
			start, end := c.Window(at)
			if got := start.UTC().Format(time.RFC3339); got != tt.from {
				t.Errorf("begins at %s, want %s", got, tt.from)
			}
			if got := end.UTC().Format(time.RFC3339); got != tt.to {
				t.Errorf("ends at %s, want %s", got, tt.to)
			}
			if got := start.In(c.zone).Format("15:04"); got != tt.fromSays {
				t.Errorf("begins at %s of the zone's clock, want %s", got, tt.fromSays)
			}
			if want, _ := time.ParseDuration(tt.len); end.Sub(start) != want {
				t.Errorf("is %v long, want %v", end.Sub(start), want)
			}
		})
	}
}

// Over years that have every kind of change, each window follows the one before
// without a gap, and the time package, asked at each minute, sees the days of the
// windows change where they begin.
func TestCalendarAgainstTime(t *testing.T) {
	zones := []string{
		"UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/St_Johns", "Africa/Cairo",
		"America/Havana", "Asia/Kathmandu", "Pacific/Apia", "Africa/Casablanca", "America/Sao_Paulo",
	}
	for _, zone := range zones {
		for unit := Hour; unit <= Year; unit++ {
			for _, starts := range []string{"", "2024-02-29", "2023-01-31", "2025-06-14"} {
				if unit < Week && starts != "" {
					continue
				}
				t.Run(fmt.Sprint(zone, unit, starts), func(t *testing.T) {
					c := calendar(t, unit, zone, starts)
					begin := time.Date(2007, 1, 1, 0, 0, 0, 0, time.UTC)
					if unit == Hour {
						begin = time.Date(2010, 1, 1, 0, 0, 0, 0, time.UTC)
					}
					stop := time.Date(2013, 1, 1, 0, 0, 0, 0, time.UTC)
					if unit > Day {
						stop = time.Date(2029, 1, 1, 0, 0, 0, 0, time.UTC)
					}
					windows := 0
					for start, end := c.Window(begin); start.Before(stop); windows++ {
						checkWindow(t, c, starts, start, end)
						next, nextEnd := c.Window(end)
						if !next.Equal(end) || !nextEnd.After(next) {
							t.Fatalf("after %v to %v comes %v to %v", start, end, next, nextEnd)
						}
						start, end = next, nextEnd
					}
					t.Log(windows, "windows")
				})
			}
		}
	}
}

// checkWindow checks a window by what the zone's clock shows in it.
func checkWindow(t *testing.T, c Calendar, starts string, start, end time.Time) {
	t.Helper()
	length := end.Sub(start)
	for _, at := range []time.Time{
		start, start.Add(1), start.Add(length / 3), start.Add(length / 2), end.Add(-1), end.Add(-time.Minute),
	} {
		if from, to := c.Window(at); !from.Equal(start) || !to.Equal(end) {
			t.Fatalf("%v is in %v to %v, and in %v to %v", at, start, end, from, to)
		}
	}
	first, last, before := start.In(c.zone), end.Add(-1).In(c.zone), start.Add(-1).In(c.zone)
	if c.unit == Hour {
		if first.Minute() != 0 || first.Second() != 0 || length != time.Hour && length != 90*time.Minute {
			t.Fatalf("an hour from %v, of %v", first, length)
		}
		return
	}
	// No clock shows a day of the window for the first time before it.
	if before.Format(time.DateOnly) >= first.Format(time.DateOnly) {
		t.Fatalf("%v to %v: just before it is %v", first, last, before)
	}
	day := time.Date(2023, 1, 1, 0, 0, 0, 0, time.UTC)
	if starts != "" {
		day, _ = time.Parse(time.DateOnly, starts)
	}
	wantDay := func(y int, m time.Month) int { return min(day.Day(), time.Date(y, m+1, 0, 0, 0, 0, 0, time.UTC).Day()) }
	var ok bool
	switch c.unit {
	case Day:
		ok = length >= 22*time.Hour && length <= 26*time.Hour
	case Week:
		want := time.Monday
		if starts != "" {
			want = day.Weekday()
		}
		ok = first.Weekday() == want && length >= 5*24*time.Hour+22*time.Hour && length <= 7*24*time.Hour+2*time.Hour
	case Month:
		ok = first.Day() == wantDay(first.Year(), first.Month()) && length <= 31*24*time.Hour+2*time.Hour
	case Year:
		ok = first.Month() == day.Month() && first.Day() == wantDay(first.Year(), first.Month()) &&
			length <= 366*24*time.Hour+2*time.Hour
	default: // hours are checked above
	}
	if !ok {
		t.Fatalf("%v to %v, %v", first, last, length)
	}
}

func TestCalendarEquality(t *testing.T) {
	month := calendar(t, Month, "Europe/Berlin", "2026-01-14")
	for _, tt := range []struct {
		unit         Unit
		zone, starts string
		same         bool
	}{
		{Month, "Europe/Berlin", "2026-01-14", true},
		{Month, "Europe/Berlin", "2024-02-14", true}, // the same months
		{Month, "Europe/Berlin", "2026-01-15", false},
		{Month, "UTC", "2026-01-14", false},
		{Week, "Europe/Berlin", "2026-01-14", false},
	} {
		if got := calendar(t, tt.unit, tt.zone, tt.starts) == month; got != tt.same {
			t.Errorf("%v: equal is %t", tt, got)
		}
	}
	if calendar(t, Week, "", "") != calendar(t, Week, "UTC", "2026-11-23") {
		t.Error("weeks from a Monday are not weeks")
	}
	if calendar(t, Year, "", "") != calendar(t, Year, "UTC", "2025-01-01") {
		t.Error("years from the first of January are not years")
	}
}

func TestCalendarErrors(t *testing.T) {
	for _, tt := range []struct {
		unit   Unit
		zone   string
		starts time.Time
		want   string
	}{
		{0, "", time.Time{}, `unknown unit 0`},
		{Day, "Europe/Berlim", time.Time{}, `unknown time zone "Europe/Berlim"; want a name such as UTC or Europe/Berlin`},
		{Day, "Local", time.Time{}, `unknown time zone "Local"; want a name such as UTC or Europe/Berlin`},
		{Day, "../etc/passwd", time.Time{}, `unknown time zone "../etc/passwd"; want a name such as UTC or Europe/Berlin`},
		{Day, "", time.Unix(0, 0), `starts moves weeks, months and years; there is none for a quota each day`},
		{Month, "", time.Date(99, 1, 1, 0, 0, 0, 0, time.UTC), `starts is from 1900 to 2200, not in 99`},
	} {
		if _, err := NewCalendar(tt.unit, tt.zone, tt.starts); err == nil || err.Error() != tt.want {
			t.Errorf("got %v, want %s", err, tt.want)
		}
	}
	if _, err := ParseUnit("fortnight"); err == nil {
		t.Error("a fortnight is a unit")
	}
	for u := Hour; u <= Year; u++ {
		if got, err := ParseUnit(u.String()); got != u || err != nil {
			t.Errorf("%v: %v %v", u, got, err)
		}
	}
}

func BenchmarkCalendarWindow(b *testing.B) {
	c := calendar(b, Month, "Europe/Berlin", "2026-01-14")
	at := time.Now().UnixMicro()
	for b.Loop() {
		c.window(at)
	}
}
