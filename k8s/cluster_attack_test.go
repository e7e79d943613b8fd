//go:build linux

package k8s

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// shipped is the memory limit of the chart's webhook in bytes, which is also
// its GOMEMLIMIT.
const shipped = 128 << 20

// beside measures the duration of calls at a given pace, first alone and then
// beside a number of concurrent attackers. No call may fail, and the 99th
// percentile beside the attack must be at most twice that without it, or below
// floor, where the load of the test itself dominates.
func beside(t *testing.T, attackers, calls int, pace, floor time.Duration, call func() error, attack func(i int)) {
	t.Helper()
	measure := func(what string, attack func(i int)) time.Duration {
		var attacks atomic.Int64
		var wg sync.WaitGroup
		done := make(chan struct{})
		for i := range attackers {
			if attack == nil {
				break
			}
			wg.Go(func() {
				for n := i; open(done); n++ {
					attack(n)
					attacks.Add(1)
				}
			})
		}
		var all []time.Duration
		ticker := time.NewTicker(pace)
		defer ticker.Stop()
		for range calls {
			<-ticker.C
			began := time.Now()
			if err := call(); err != nil {
				t.Errorf("an honest call: %v", err)
			}
			all = append(all, time.Since(began))
		}
		close(done)
		wg.Wait()
		slices.Sort(all)
		p99 := all[len(all)*99/100]
		t.Logf("p99 %v %s, beside %d attacks", p99, what, attacks.Load())
		return p99
	}
	quiet := measure("quiet", nil)
	if attacked := measure("attacked", attack); attacked > 2*quiet && attacked > floor {
		t.Errorf("p99 of honest calls: %v, and %v quiet", attacked, quiet)
	}
}

// costly returns bodies that would cost a webhook without limits too much
// memory or time, and the most expensive ones that the limits allow.
func costly(namespace string) [][]byte {
	var all [][]byte
	for _, p := range []string{
		podWith(many(330_000, `{"name":""}`)),
		podWith(many(500_000, `{"a":0}`)),
		podWith(many(33_000, `{"a":0}`)),
		podWith(`{"name":"` + strings.Repeat("x", maxReview-2000) + `"}`),
		podWith(`{"name":"` + strings.Repeat("x", 2*maxReview) + `"}`),
		podWith(many(9_900, `0`)),
		`{"metadata":{"annotations":{"sluice.dev/resources":"{limits: {` + strings.Repeat("a: 1, ", 110_000) +
			`}}"}},"spec":{"containers":[{"name":"envoy"}]}}`,
		`{"metadata":{"labels":{"sluice.dev/inject":"` + strings.Repeat("x", 700_000) +
			`"}},"spec":{"containers":[{"name":"envoy"}]}}`,
		`{"metadata":{"name":"` + strings.Repeat("x", 700_000) +
			`","annotations":{"sluice.dev/in-process":"true"}},"spec":{"containers":[{"name":"envoy"}]}}`,
	} {
		all = append(all, []byte(reviewOf(namespace, p)))
	}
	return all
}

// TestClusterAttackDirect sends expensive reviews to a webhook that has the
// memory limit of the chart, without an API server in between.
func TestClusterAttackDirect(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("takes half a minute, and root: SLUICE_LONG=1")
	}
	dir := t.TempDir()
	certificate := selfSigned(t, x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	write := writeIn(t, dir)
	write("tls.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]})))
	write("tls.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
	ports := freePorts(t, 2)
	g := testenv.NewMemoryGroup(t, "direct", shipped)
	p := start(t, []string{"GOMEMLIMIT=" + strconv.Itoa(shipped)}, g.Launcher(t, program(t)), "webhook",
		"--listen=127.0.0.1:"+ports[0], "--metrics=127.0.0.1:"+ports[1], "--cert-dir="+dir, "--log-level=error")
	roots := x509.NewCertPool()
	roots.AddCert(certificate.Leaf)
	client := &http.Client{Timeout: 10 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, NextProtos: []string{"http/1.1"}},
			MaxIdleConnsPerHost: 50}}
	post := func(ctx context.Context, body io.Reader, retries int) (int, []byte, error) {
		text, err := io.ReadAll(body)
		if err != nil {
			return 0, nil, err
		}
		for {
			q, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://127.0.0.1:"+ports[0]+"/inject",
				bytes.NewReader(text))
			if err != nil {
				return 0, nil, err
			}
			response, err := client.Do(q)
			if err != nil {
				return 0, nil, err
			}
			answer, err := io.ReadAll(response.Body)
			_ = response.Body.Close()
			if response.StatusCode != http.StatusTooManyRequests || retries == 0 {
				return response.StatusCode, answer, err
			}
			retries--
			select { // as Retry-After says and API servers do
			case <-time.After(time.Second):
			case <-ctx.Done():
				return 0, nil, ctx.Err()
			}
		}
	}
	honest := []byte(reviewOf("shop", podWith(many(100, `{"name":"NAME","value":"some value of a variable"}`))))
	call := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second) // the timeout of API servers
		defer cancel()
		status, answer, err := post(ctx, bytes.NewReader(honest), 3)
		if err != nil || status != http.StatusOK {
			return fmt.Errorf("%d, %w", status, err)
		}
		var r admissionReview
		if err := json.Unmarshal(answer, &r); err != nil || r.Response == nil || r.Response.Patch == nil {
			return fmt.Errorf("%.300s", answer)
		}
		return nil
	}
	await(t, "the webhook", func() bool { return call() == nil })
	bodies := costly("greedy")
	beside(t, 3, 400, 20*time.Millisecond, 50*time.Millisecond, call, func(i int) {
		_, _, _ = post(t.Context(), bytes.NewReader(bodies[i%len(bodies)]), 0)
		<-time.After(rand.N(200 * time.Millisecond)) // the attackers' pace, so that their own load is not measured
	})
	// Send them all at once, each from another namespace.
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			for _, body := range costly(fmt.Sprint("greedy-", i))[i%3 : i%3+3] {
				_, _, _ = post(t.Context(), bytes.NewReader(body), 0)
			}
		})
	}
	wg.Wait()
	if err := call(); err != nil {
		t.Errorf("after it: %v", err)
	}
	select {
	case <-p.exited:
		t.Errorf("it ended: %v", p.ProcessState)
	default:
	}
	if t.Logf("at most %d MiB", g.Peak(t)>>20); g.Killed(t) {
		t.Error("it was killed for want of memory")
	}
}

// TestClusterAttack creates expensive pods in one namespace through a real API
// server, beside ordinary pods in another one.
func TestClusterAttack(t *testing.T) {
	if !long(t) {
		return
	}
	c := cluster(t, "--enable-aggregator-routing=true")
	r := install(t, c)
	r.env = append(r.env, "GOMEMLIMIT="+strconv.Itoa(shipped))
	var groups []*testenv.MemoryGroup
	for i := range r.running {
		g := testenv.NewMemoryGroup(t, strconv.Itoa(i), shipped)
		groups = append(groups, g)
		r.within = g
		r.run(t, i)
	}
	for _, name := range []string{"shop", "greedy"} {
		namespace(t, c, name, object{injectLabel: "enabled"})
	}
	honest := pod(t, strings.Replace(podText("", "{containers: [{name: envoy, SECURE}]}"), "{metadata: {",
		"{metadata: {generateName: h-, ", 1))
	call := func() error {
		var out object
		if err := c.call(t.Context(), http.MethodPost, "/api/v1/namespaces/shop/pods", honest, &out); err != nil {
			return err
		}
		if sidecarIndex(out) != 0 {
			return fmt.Errorf("not injected: %v", out)
		}
		return nil
	}
	attacks := []object{
		pod(t, `{metadata: {generateName: a-}, spec: {containers: [{name: envoy, image: x, env: [`+many(330_000, "{}")+
			`]}]}}`),
		pod(t, `{metadata: {generateName: a-, annotations: {sluice.dev/in-process: "true", sluice.dev/resources: `+
			`"{limits: {`+strings.Repeat("a: 1, ", 110_000)+`}}"}}, spec: {containers: [{name: envoy, image: x}]}}`),
		pod(t, `{metadata: {generateName: a-, annotations: {sluice.dev/in-process: "true"}}, spec: {containers: `+
			`[{name: envoy, image: x, env: [`+many(5000, "{name: A}")+`]}]}}`),
		pod(t, `{metadata: {generateName: a-, annotations: {sluice.dev/in-process: "true"}}, spec: {containers: [`+
			many(20_000, "{}")+`]}}`),
	}
	// The client is told why its pod is denied.
	for i, want := range []string{"the pod is too large to be injected", "annotation sluice.dev/resources"} {
		err := c.call(t.Context(), http.MethodPost, "/api/v1/namespaces/greedy/pods", attacks[i], &object{})
		if !hasStatus(err, http.StatusForbidden) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.500v; want one with %q", err, want)
		}
	}
	// Such pods keep the API server itself busy, for a second each on a small
	// machine, so that only its own timeout bounds the ordinary calls.
	beside(t, 2, 200, 50*time.Millisecond, 5*time.Second, call, func(i int) {
		_ = c.call(t.Context(), http.MethodPost, "/api/v1/namespaces/greedy/pods", attacks[i%len(attacks)], &object{})
		<-time.After(rand.N(time.Second)) // the attackers' pace
	})
	for i, g := range groups {
		select {
		case <-r.running[i].exited:
			t.Errorf("replica %d ended: %v", i, r.running[i].ProcessState)
		default:
		}
		if t.Logf("replica %d: at most %d MiB", i, g.Peak(t)>>20); g.Killed(t) {
			t.Errorf("replica %d was killed for want of memory", i)
		}
	}
}

// TestClusterBusy checks that an API server retries after a 429.
func TestClusterBusy(t *testing.T) {
	if !long(t) {
		return
	}
	c := cluster(t)
	var asked atomic.Int64
	h := testWebhook()
	handler := http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if asked.Add(1) == 1 {
			for range cap(h.slots.small) {
				h.slots.small <- struct{}{}
			}
			h.slots.wait = time.Millisecond
			h.ServeHTTP(w, q)
			h.slots.wait = reviewWait
			for range cap(h.slots.small) {
				<-h.slots.small
			}
			return
		}
		h.ServeHTTP(w, q)
	})
	serveWebhook(t, c.API, "busy.sluice.dev", handler, object{injectLabel: "enabled"}, "Never")
	namespace(t, c, "shop", object{injectLabel: "enabled"})
	var out object
	p := pod(t, `{metadata: {name: web, annotations: {sluice.dev/in-process: "true"}}, spec: {containers: [{name: `+
		`envoy, image: x}]}}`)
	if err := c.call(t.Context(), http.MethodPost, "/api/v1/namespaces/shop/pods", p, &out); err != nil {
		t.Fatal(err)
	}
	if asked.Load() < 2 || sidecarIndex(out) != 0 {
		t.Errorf("asked %d times: %v", asked.Load(), out)
	}
}
