//go:build race

package policy

import "time"

const (
	// raceAllocations is what a sync.Pool allocates with -race, which drops
	// some of what is put into it.
	raceAllocations = 2
	// bombTime is the processor time that a bad config may take.
	bombTime = time.Second
	// absenceStep makes TestAbsence try each expression with every n-th source,
	// because all of them take a minute.
	absenceStep = 5
)
