// Command app is the app behind Envoy in the pods of TestNode. It answers with
// the pod's name.
package main

import (
	"net/http"
	"os"
)

func main() {
	name, _ := os.Hostname()
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X-Pod", name) })
	err := http.ListenAndServe("127.0.0.1:8081", handler) //nolint:gosec // only Envoy calls it
	println(err.Error())
	os.Exit(1)
}
