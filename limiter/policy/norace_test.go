//go:build !race

package policy

import "time"

const (
	raceAllocations = 0
	bombTime        = 100 * time.Millisecond
	absenceStep     = 1
)
