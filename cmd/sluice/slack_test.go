//go:build !race

package main

import "time"

// slack is what an answer may take over its budget.
const slack = 50 * time.Millisecond

// isRace says that the race detector is on.
const isRace = false
