package page

import (
	"testing"
	"time"
)

// TestQuantile checks quantiles of the observations between two states of a
// histogram with the bounds 1, 2 and 4.
func TestQuantile(t *testing.T) {
	bounds := []float64{1, 2, 4}
	before := histogram{bounds: bounds, buckets: [maxBuckets]uint64{5, 5, 5}, count: 5}
	for _, tt := range []struct {
		name    string
		buckets [maxBuckets]uint64 // cumulative counts of the later state
		count   uint64
		q, want float64
	}{
		{"within the first bucket", [maxBuckets]uint64{15, 15, 15}, 15, .5, .5},
		{"within the second bucket", [maxBuckets]uint64{5, 15, 15}, 15, .5, 1.5},
		{"at a bound", [maxBuckets]uint64{10, 15, 15}, 15, .5, 1},
		{"above the last bound", [maxBuckets]uint64{5, 5, 5}, 15, .99, 4},
	} {
		after := histogram{bounds: bounds, buckets: tt.buckets, count: tt.count}
		if got := quantile(tt.q, &before, &after); got == nil || *got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	if got := quantile(.5, &before, &before); got != nil {
		t.Errorf("without observations: %v, want nil", *got)
	}
}

// TestHistory checks the rates of the past seconds, and that the history is
// bounded.
func TestHistory(t *testing.T) {
	var h history
	start := time.Unix(1000, 0)
	for i := range maxSamples + 10 {
		h.add(sample{at: start.Add(time.Duration(i) * 2 * time.Second), passed: uint64(6 * i), limited: uint64(2 * i)})
	}
	all := h.seconds()
	if len(all) != maxSamples {
		t.Fatalf("%d seconds, want %d", len(all), maxSamples)
	}
	want := second{At: start.Unix() + 2*(maxSamples+9), Passed: 3, Limited: 1}
	if got := all[len(all)-1]; got != want {
		t.Errorf("the latest second is %+v, want %+v", got, want)
	}
}
