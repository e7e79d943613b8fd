package policy_test

import (
	"errors"
	"fmt"
	"os"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// A config with two limits, and the buckets that a request draws from.
func ExampleConfig_Draw() {
	config, err := policy.Parse("sluice.yaml", []byte(`
limits:
  - name: per-client
    key: client.network
    rate: 10/s
    burst: 20
  - name: orders
    match: {methods: [POST], paths: [/v1/orders]}
    rate: 60/m
    cost: 5
`), os.LookupEnv)
	if err != nil {
		fmt.Println(err)
		return
	}
	draw := config.Draw(&policy.Request{
		Method: "POST",
		Host:   "api.example.com",
		Path:   "/v1//orders/",
		Source: policy.Peer{Address: "203.0.113.7"},
	})
	for _, charge := range draw.Charges {
		fmt.Printf("%s: %d of %d tokens\n", charge.Limit.Name, charge.Cost, charge.Bucket.Burst())
	}
	// Output:
	// per-client: 1 of 20 tokens
	// orders: 5 of 60 tokens
}

// The error holds every mistake with its position.
func ExampleParse() {
	_, err := policy.Parse("sluice.yaml", []byte("on_failure: maybe\nlimits: [{rate: 1/s}]\n"), os.LookupEnv)
	mistakes, _ := errors.AsType[policy.Mistakes](err)
	for _, m := range mistakes {
		fmt.Printf("%s:%d:%d %s\n", m.File, m.Line, m.Column, m.Field)
	}
	// Output:
	// sluice.yaml:1:13 on_failure
	// sluice.yaml:2:10 limits[0].name
}
