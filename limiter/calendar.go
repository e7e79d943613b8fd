package limiter

import (
	"fmt"
	"hash/maphash"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Unit is what the windows of a Calendar are.
type Unit uint8

// The units. The zero Unit is none.
const (
	Hour Unit = 1 + iota
	Day
	Week
	Month
	Year
)

var unitNames = [...]string{Hour: "hour", Day: "day", Week: "week", Month: "month", Year: "year"}

// String returns the unit's name, which ParseUnit reads.
func (u Unit) String() string {
	if u >= Hour && u <= Year {
		return unitNames[u]
	}
	return fmt.Sprintf("Unit(%d)", uint8(u))
}

// ParseUnit returns the unit with a name: hour, day, week, month or year.
func ParseUnit(name string) (Unit, error) {
	for u := Hour; u <= Year; u++ {
		if unitNames[u] == name {
			return u, nil
		}
	}
	return 0, fmt.Errorf("unknown unit %q; want hour, day, week, month or year", name)
}

// Calendar divides time into windows: the hours, days, weeks, months or years of a
// time zone. It is a comparable value; equal arguments make equal Calendars. The
// zero value has no windows.
type Calendar struct {
	unit Unit
	zone *time.Location
	// first is a day on which a week, a month or a year begins, in days since 1970.
	first int32
}

// The first days of weeks, months and years that NewCalendar is not told.
const (
	firstMonday  = 4 // 1970-01-05
	firstOfMonth = 0 // 1970-01-01
)

// locations has each *time.Location by its name, so that equal zones make equal
// Calendars. It has as many entries as the machine has zones at most.
var locations sync.Map

// location returns the time zone with a name of the IANA database; empty is UTC.
func location(name string) (*time.Location, error) {
	if name == "" {
		name = "UTC"
	}
	if known, ok := locations.Load(name); ok {
		return known.(*time.Location), nil
	}
	loaded, err := time.LoadLocation(name)
	if err != nil || strings.EqualFold(name, "local") {
		return nil, fmt.Errorf("unknown time zone %q; want a name such as UTC or Europe/Berlin", name)
	}
	known, _ := locations.LoadOrStore(name, loaded)
	return known.(*time.Location), nil
}

// NewCalendar returns the Calendar of a unit in a time zone, which is a name of the
// IANA database; empty is UTC. Unless starts is zero, weeks begin on its weekday,
// months on its day, and years on its month and day, each cut to a month's last
// day; hours and days may have no starts. Otherwise weeks begin on Mondays. Only
// the date of starts counts. The error says which argument is invalid.
func NewCalendar(unit Unit, zone string, starts time.Time) (Calendar, error) {
	if unit < Hour || unit > Year {
		return Calendar{}, fmt.Errorf("unknown unit %d", uint8(unit))
	}
	loaded, err := location(zone)
	if err != nil {
		return Calendar{}, err
	}
	c := Calendar{unit: unit, zone: loaded, first: firstOfMonth}
	if unit == Week {
		c.first = firstMonday
	}
	if starts.IsZero() {
		return c, nil
	}
	if unit < Week {
		return Calendar{}, fmt.Errorf("starts moves weeks, months and years; there is none for a quota each %s", unit)
	}
	y, m, d := starts.Date()
	if y < 1900 || y > 2200 {
		return Calendar{}, fmt.Errorf("starts is from 1900 to 2200, not in %d", y)
	}
	c.first = int32(days(y, m, d))
	switch unit {
	case Week: // all of one weekday are alike
		c.first = (c.first-firstMonday)%7 + firstMonday
		if c.first < firstMonday {
			c.first += 7
		}
	case Month: // January has every day
		c.first = int32(days(1970, time.January, d))
	case Year: // 1972 has every day
		c.first = int32(days(1972, m, d))
		if m == time.January && d == 1 {
			c.first = firstOfMonth
		}
	default: // refused above
	}
	return c, nil
}

// Unit returns what the calendar's windows are; 0 for the zero Calendar.
func (c Calendar) Unit() Unit { return c.unit }

// Zone returns the name of the calendar's time zone.
func (c Calendar) Zone() string { return c.zone.String() }

// Window returns the window that an instant is in: it begins at start, and the
// next one begins at end. Both are whole seconds.
//
// An hour begins whenever the zone's clocks show a full hour. So it has 60 minutes
// through a change of an hour to or from summer time, and 90 where a change of
// half an hour leaves a full hour out. Each other window begins at the first
// instant at which the zone's clocks show its first day or a later one: that is
// midnight, or where a change leaves midnight out, what comes in its place.
func (c Calendar) Window(at time.Time) (start, end time.Time) {
	at = at.In(c.zone)
	if c.unit == Hour {
		return c.hourBegan(at), c.hourEnds(at)
	}
	y, m, d := at.Date()
	today := days(y, m, d)
	// Where clocks go back over midnight, a date comes twice. The next day has
	// begun for good when it came first.
	if !at.Before(c.begins(today + 1)) {
		today++
	}
	first, next := c.firstDays(today)
	return c.begins(first), c.begins(next)
}

// recent has windows that were asked for lately, as most are asked for again and
// again. A slot is for the calendars of one hash.
var (
	recent     [256]atomic.Pointer[recentWindow]
	recentSeed = maphash.MakeSeed()
)

type recentWindow struct {
	calendar Calendar
	quotaState
}

// window is Window in microseconds since 1970.
func (c Calendar) window(at int64) window { return c.begin(at).window }

// begin returns the state of a quota in the window of an instant. All quotas that
// are in their first use of the window share it, to save memory.
func (c Calendar) begin(at int64) *quotaState {
	slot := &recent[maphash.Comparable(recentSeed, c)%uint64(len(recent))]
	if known := slot.Load(); known != nil && known.calendar == c && known.window.holds(at) {
		return &known.quotaState
	}
	start, end := c.Window(time.UnixMicro(at))
	next := &recentWindow{c, quotaState{window: window{start.UnixMicro(), end.UnixMicro()}}}
	slot.Store(next)
	return &next.quotaState
}

// window is a window of a calendar: from start on, and before end, both in
// microseconds since 1970. The zero window is none.
type window struct{ start, end int64 }

// holds reports whether an instant is in the window.
func (w window) holds(at int64) bool { return w.start <= at && at < w.end }

// sinceFull returns how many seconds ago a clock in a zone showed a full hour, if
// nothing has changed it since.
func sinceFull(at time.Time) int64 {
	_, offset := at.Zone()
	return (((at.Unix() + int64(offset)) % 3600) + 3600) % 3600
}

// hourBegan returns when a clock last showed a full hour.
func (c Calendar) hourBegan(at time.Time) time.Time {
	for {
		began := time.Unix(at.Unix()-sinceFull(at), 0)
		changed, _ := at.ZoneBounds()
		if changed.IsZero() || !began.Before(changed) {
			return began
		}
		at = changed.Add(-1).In(c.zone)
	}
}

// hourEnds returns when a clock next shows a full hour.
func (c Calendar) hourEnds(at time.Time) time.Time {
	for {
		ends := time.Unix(at.Unix()-sinceFull(at)+3600, 0)
		_, changes := at.ZoneBounds()
		if changes.IsZero() || ends.Before(changes) {
			return ends
		}
		if at = changes.In(c.zone); sinceFull(at) == 0 {
			return at
		}
	}
}

// begins returns the first instant at which the zone's clocks show a day, in days
// since 1970, or a later one.
func (c Calendar) begins(day int) time.Time {
	const most = 26 * 3600 // seconds between a zone's clock and UTC, and more
	midnight := int64(day) * 86400
	at := time.Unix(midnight-most, 0).In(c.zone)
	from := at.Unix()
	for {
		_, offset := at.Zone()
		begins := max(from, midnight-int64(offset))
		_, changes := at.ZoneBounds()
		if changes.IsZero() || begins < changes.Unix() {
			return time.Unix(begins, 0)
		}
		at, from = changes.In(c.zone), changes.Unix()
	}
}

// firstDays returns the first day of the window that a day is in, and that of the
// next window, in days since 1970.
func (c Calendar) firstDays(day int) (first, next int) {
	_, month, monthDay := dateOf(int(c.first))
	y, m, _ := dateOf(day)
	switch c.unit {
	case Week:
		since := ((day-int(c.first))%7 + 7) % 7
		return day - since, day - since + 7
	case Month:
		if first = cut(y, m, monthDay); first > day {
			return cut(y, m-1, monthDay), first
		}
		return first, cut(y, m+1, monthDay)
	case Year:
		if first = cut(y, month, monthDay); first > day {
			return cut(y-1, month, monthDay), first
		}
		return first, cut(y+1, month, monthDay)
	default: // a day
		return day, day + 1
	}
}

// cut returns a day of a month, or the month's last one if it has fewer days. The
// month may be 0 or 13.
func cut(y int, m time.Month, d int) int {
	return min(days(y, m, d), days(y, m+1, 1)-1)
}

// days returns the days since 1970 of a date, as time.Date reads it.
func days(y int, m time.Month, d int) int {
	return int(floorDiv(time.Date(y, m, d, 0, 0, 0, 0, time.UTC).Unix(), 86400))
}

func dateOf(day int) (int, time.Month, int) { return time.Unix(int64(day)*86400, 0).UTC().Date() }

func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}
