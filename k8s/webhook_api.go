package k8s

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// API is a client of a cluster's API server that authenticates with the token
// of a service account. The webhook makes only four kinds of calls, for which
// client-go would be too large. It is safe for concurrent use.
type API struct {
	base    string // https://host:port
	account string // the directory with token and ca.crt
	client  *http.Client
}

// InCluster returns a client of the API server of the cluster that this process
// runs in. getenv looks up an environment variable. account is the directory of
// the service account, with the files token and ca.crt. It returns an error if
// KUBERNETES_SERVICE_HOST or KUBERNETES_SERVICE_PORT is not set, or if ca.crt
// holds no certificate.
func InCluster(getenv func(string) (string, bool), account string) (*API, error) {
	host, _ := getenv("KUBERNETES_SERVICE_HOST")
	port, _ := getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("not running in a Kubernetes cluster: KUBERNETES_SERVICE_HOST and " +
			"KUBERNETES_SERVICE_PORT are not set")
	}
	file := filepath.Join(account, "ca.crt")
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s: contains no PEM certificate", file)
	}
	return &API{base: "https://" + net.JoinHostPort(host, port), account: account, client: &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			ForceAttemptHTTP2: true,
		},
	}}, nil
}

// statusError is an answer of the API server with a status that is not 2xx.
type statusError struct {
	status int
	text   string
}

func (e *statusError) Error() string { return fmt.Sprintf("%d: %s", e.status, e.text) }

// hasStatus reports whether err is a statusError with this status.
func hasStatus(err error, status int) bool {
	var e *statusError
	return errors.As(err, &e) && e.status == status
}

// call sends in as JSON, unless it is nil, and decodes the answer into out. It
// reads at most 8 MiB. An answer whose status is not 2xx is a statusError.
func (a *API) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	request, err := http.NewRequestWithContext(ctx, method, a.base+path, body)
	if err != nil {
		return err
	}
	token, err := os.ReadFile(filepath.Join(a.account, "token")) // read for each call, as the kubelet renews it
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	if request.Header.Set("Content-Type", "application/json"); method == http.MethodPatch {
		request.Header.Set("Content-Type", "application/json-patch+json")
	}
	response, err := a.client.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(response.Body, 8<<20))
	if err != nil {
		return err
	}
	if response.StatusCode/100 != 2 {
		var status struct{ Message string }
		if json.Unmarshal(text, &status) != nil || status.Message == "" {
			status.Message = http.StatusText(response.StatusCode)
		}
		return fmt.Errorf("%s %s: %w", method, path, &statusError{response.StatusCode, status.Message})
	}
	return json.Unmarshal(text, out)
}
