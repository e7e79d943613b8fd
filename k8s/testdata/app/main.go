// The app behind the Envoy of a pod on a real node: it answers with the pod's name.
package main

import (
	"net/http"
	"os"
)

func main() {
	name, _ := os.Hostname()
	err := http.ListenAndServe("127.0.0.1:8081", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { //nolint:gosec // only Envoy calls it
		w.Header().Set("X-Pod", name)
	}))
	println(err.Error())
	os.Exit(1)
}
