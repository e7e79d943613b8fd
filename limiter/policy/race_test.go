//go:build race

package policy

import "time"

const (
	// raceAllocations is what a sync.Pool costs with -race, which drops what is put into one now and then.
	raceAllocations = 2
	// bombTime is how long a bad config may take.
	bombTime = time.Second
	// absenceStep has TestAbsence try each of its expressions with one source in so many, as all take a minute.
	absenceStep = 5
)
