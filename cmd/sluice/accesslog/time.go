package accesslog

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// months are the names of months in the common log format.
const months = "JanFebMarAprMayJunJulAugSepOctNovDec"

// parseTime parses a time as logs write it: 17/May/2015:10:05:03 +0000, RFC 3339
// with T or a space, with or without a zone (UTC), or a number of seconds,
// milliseconds, microseconds or nanoseconds since 1970. at is in microseconds
// since 1970, and grain is the unit of its last digit, at least a microsecond.
func parseTime(s string) (at int64, grain time.Duration, err error) {
	s = strings.Trim(s, "[]")
	if len(s) == 26 && s[2] == '/' && s[6] == '/' && s[11] == ':' {
		return parseCommon(s)
	}
	if len(s) >= 19 && s[4] == '-' && s[7] == '-' {
		return parseISO(s)
	}
	return parseEpoch(s)
}

func wrongTime(s string) error { return fmt.Errorf("a time is %s", quote(s)) }

func parseCommon(s string) (int64, time.Duration, error) {
	day, ok1 := digits(s[:2])
	month := strings.Index(months, s[3:6])
	year, ok2 := digits(s[7:11])
	hour, ok3 := digits(s[12:14])
	minute, ok4 := digits(s[15:17])
	second, ok5 := digits(s[18:20])
	zone, ok6 := parseZone(s[21:])
	if month < 0 || month%3 != 0 || !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || !ok6 || s[20] != ' ' ||
		!valid(year, month/3+1, day, hour, minute, second) {
		return 0, 0, wrongTime(s)
	}
	seconds := time.Date(year, time.Month(month/3+1), day, hour, minute, second, 0, time.UTC).Unix() - zone
	return seconds * 1e6, time.Second, nil
}

func parseISO(s string) (int64, time.Duration, error) {
	year, ok1 := digits(s[:4])
	month, ok2 := digits(s[5:7])
	day, ok3 := digits(s[8:10])
	hour, ok4 := digits(s[11:13])
	minute, ok5 := digits(s[14:16])
	second, ok6 := digits(s[17:19])
	if !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || !ok6 || s[10] != 'T' && s[10] != ' ' && s[10] != 't' || s[13] != ':' ||
		s[16] != ':' || !valid(year, month, day, hour, minute, second) {
		return 0, 0, wrongTime(s)
	}
	rest, micros, grain := s[19:], int64(0), time.Second
	if rest != "" && (rest[0] == '.' || rest[0] == ',') {
		end := 1
		for end < len(rest) && rest[end] >= '0' && rest[end] <= '9' {
			end++
		}
		if end == 1 {
			return 0, 0, wrongTime(s)
		}
		micros, grain = fraction(rest[1:end])
		rest = rest[end:]
	}
	zone, ok := parseZone(strings.TrimSpace(rest))
	if !ok {
		return 0, 0, wrongTime(s)
	}
	seconds := time.Date(year, time.Month(month), day, hour, minute, second, 0, time.UTC).Unix() - zone
	return seconds*1e6 + micros, grain, nil
}

// fraction returns the digits after a point as microseconds, rounded down, and
// the unit of the last.
func fraction(text string) (micros int64, grain time.Duration) {
	grain = time.Second
	unit := int64(1e6)
	for i := range min(len(text), 6) {
		unit /= 10
		micros += int64(text[i]-'0') * unit
		grain /= 10
	}
	return micros, max(grain, time.Microsecond)
}

// parseEpoch parses a number since 1970. Its unit follows from its size.
func parseEpoch(s string) (int64, time.Duration, error) {
	whole, behind, hasPoint := strings.Cut(s, ".")
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || n < 0 || whole[0] == '+' {
		return 0, 0, wrongTime(s)
	}
	switch {
	case n < 1e11: // seconds, until the year 5138
		if !hasPoint {
			return n * 1e6, time.Second, nil
		}
		if _, ok := digits(behind[:min(len(behind), 9)]); !ok || behind == "" {
			return 0, 0, wrongTime(s)
		}
		micros, grain := fraction(behind)
		return n*1e6 + micros, grain, nil
	case n < 1e14:
		return n * 1e3, time.Millisecond, nil
	case n < 1e17:
		return n, time.Microsecond, nil
	}
	return n / 1e3, time.Microsecond, nil
}

// parseZone parses the offset of a zone: Z, UTC, +0200, +02:00, or nothing. It
// returns seconds.
func parseZone(s string) (int64, bool) {
	switch s {
	case "", "Z", "z", "UTC", "GMT":
		return 0, true
	}
	text := strings.Replace(s, ":", "", 1)
	if len(text) != 5 && len(text) != 3 || text[0] != '+' && text[0] != '-' {
		return 0, false
	}
	hours, ok := digits(text[1:3])
	minutes := 0
	if len(text) == 5 && ok {
		minutes, ok = digits(text[3:])
	}
	if !ok || hours > 23 || minutes > 59 {
		return 0, false
	}
	seconds := int64(hours*3600 + minutes*60)
	if text[0] == '-' {
		seconds = -seconds
	}
	return seconds, true
}

// digits parses a text of digits alone.
func digits(s string) (n int, ok bool) {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		n = 10*n + int(s[i]-'0')
	}
	return n, true
}

func valid(year, month, day, hour, minute, second int) bool {
	return year >= 1970 && month >= 1 && month <= 12 && day >= 1 && day <= 31 && hour <= 23 && minute <= 59 && second <= 60
}
