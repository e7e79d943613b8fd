package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	group "github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/sluiceproxy/sluice/k8s"
)

// webhook is what the command line says of it.
type webhook struct {
	listen, metrics, account, certs, logLevel string
	sidecar                                   sidecarFlags
	linger, grace                             time.Duration
	own                                       k8s.CertOptions
	client                                    k8s.ClientCA
}

func (p *program) webhookCommand() *cobra.Command {
	var w webhook
	c := &cobra.Command{
		Use:   "webhook",
		Short: "Run the admission webhook that adds the sidecar in a cluster",
		Long: `Run the mutating admission webhook that adds the sidecar to pods as they are created, until SIGTERM or SIGINT.

It makes its certificates by itself, from a CA in a Secret, and keeps the caBundle of its configuration; --cert-dir takes tls.crt and
tls.key from elsewhere instead, as from cert-manager, and asks nothing of the cluster.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := untilSignal(c.Context())
			defer stop()
			return p.runWebhook(ctx, &w)
		},
	}
	f := c.Flags()
	f.StringVar(&w.listen, "listen", ":9443", "`address` for the API server's reviews, host:port")
	f.StringVar(&w.metrics, "metrics", ":9003", "`address` for /metrics, /healthz and /readyz")
	w.sidecar.register(f)
	f.StringVar(&w.own.Namespace, "namespace", "", "the webhook's own `namespace` (default its service account's)")
	f.StringVar(&w.own.Service, "service", "sluice-webhook", "`name` of the Service that the API server asks")
	f.StringVar(&w.own.Secret, "secret", "sluice-webhook-ca", "`name` of the Secret that holds the CA")
	f.StringVar(&w.own.Configuration, "config-name", "sluice", "`name` of the MutatingWebhookConfiguration")
	f.DurationVar(&w.own.Lifetime, "ca-life", 10*365*24*time.Hour, "how long a CA lives, as a `duration`; it is replaced after four fifths")
	f.DurationVar(&w.own.Overlap, "ca-overlap", time.Hour, "how long an old and a new CA are both believed, as a `duration`")
	f.DurationVar(&w.own.Interval, "ca-check", time.Minute, "`interval` at which the CA is checked")
	f.StringVar(&w.account, "service-account", "/var/run/secrets/kubernetes.io/serviceaccount", "`directory` with the token, ca.crt and namespace")
	f.StringVar(&w.certs, "cert-dir", "", "`directory` with tls.crt and tls.key, reread when they change (default: it makes its own)")
	f.StringVar(&w.client.File, "client-ca-file", "", "`file` with the CAs of clients, in PEM, reread when it changes: who shows no certificate of theirs is refused (default: all are answered)")
	f.StringArrayVar(&w.client.Names, "client-name", nil, "`name` that a client's certificate must have as common name or DNS name, for each one that is let in (default any)")
	f.DurationVar(&w.linger, "linger", 5*time.Second, "`duration` for which it answers on when told to stop, until no API server asks it any more")
	f.DurationVar(&w.grace, "grace", 10*time.Second, "`duration` for what is in flight after that")
	f.StringVar(&w.logLevel, "log-level", "info", "`level`: debug, info, warn or error")
	return c
}

func (p *program) runWebhook(ctx context.Context, w *webhook) error {
	log, _, err := newLog(p.stderr, w.logLevel)
	if err != nil {
		return usageError{err}
	}
	if w.own.Lifetime <= 0 || w.own.Overlap <= 0 || w.own.Interval <= 0 || w.own.Interval > w.own.Overlap/2 || w.own.Overlap > w.own.Lifetime/20 {
		return usageError{errors.New("--ca-check must be at most half of --ca-overlap, and that at most a twentieth of --ca-life")}
	}
	injection, err := w.sidecar.options()
	if err != nil {
		return err
	}
	if len(w.client.Names) > 0 && w.client.File == "" {
		return usageError{errors.New("--client-name requires --client-ca-file")}
	}
	certificate, maintain, err := p.certificates(ctx, w, log)
	if err != nil {
		return err
	}
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: certificate}
	if w.client.File != "" {
		if tlsConfig, err = w.client.Require(tlsConfig); err != nil {
			return fmt.Errorf("--client-ca-file: %w", err)
		}
	}
	reviews, err := net.Listen("tcp", w.listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", plain(err))
	}
	defer func() { _ = reviews.Close() }()
	metrics, err := net.Listen("tcp", w.metrics)
	if err != nil {
		return fmt.Errorf("--metrics: %w", plain(err))
	}
	defer func() { _ = metrics.Close() }()

	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("/inject", k8s.Webhook(injection, log, registry))
	var draining atomic.Bool
	server := newServer(reviews, leaving(&draining, mux), log, bounds{connections: 256})
	server.TLSConfig = tlsConfig
	status := http.NewServeMux()
	status.Handle("GET /metrics", scrapes(registry, log, promhttp.HandlerOpts{}))
	status.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { sayStatus(w, http.StatusOK, "ok") })
	status.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if draining.Load() {
			sayStatus(w, http.StatusServiceUnavailable, "draining")
			return
		}
		sayStatus(w, http.StatusOK, "ok")
	})
	side := newServer(metrics, status, log, bounds{})

	background, cancel := context.WithCancel(context.Background())
	defer cancel()
	var all group.Group
	stopped := make(chan struct{})
	all.Add(func() error {
		select {
		case <-ctx.Done():
		case <-stopped:
			return nil
		}
		log.Info("draining", zap.Duration("linger", w.linger))
		draining.Store(true)
		// Nobody says when the last API server knows that this replica leaves, so it answers on for a while. That is why the chart has no
		// preStop hook to do so: through one, API servers would keep their connections, and an upgraded webhook's pods would wait.
		select {
		case <-time.After(w.linger):
		case <-stopped:
		}
		return nil
	}, func(error) { close(stopped) })
	all.Add(server.run, func(error) {
		ctx, over := context.WithTimeout(context.Background(), w.grace)
		defer over()
		_ = server.Shutdown(ctx)
		_ = server.Close()
	})
	all.Add(side.run, func(error) { _ = side.Close() })
	all.Add(func() error { maintain(background); return nil }, func(error) { cancel() })
	log.Info("serving", zap.String("version", buildVersion()), zap.String("stamp", k8s.Stamp(injection)),
		zap.Stringer("listen", reviews.Addr()), zap.Stringer("metrics", metrics.Addr()))
	err = all.Run()
	log.Info("stopped", zap.Error(err))
	return err
}

// leaving answers as h does, and closes each connection with its answer once draining is true: API servers keep theirs, over HTTP/1.1, and
// a review that is sent on one as it is closed for being idle is lost.
func leaving(draining *atomic.Bool, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if draining.Load() {
			w.Header().Set("Connection", "close")
		}
		h.ServeHTTP(w, q)
	})
}

type getCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error)

// certificates returns what serves, which is there already, and what keeps it so until its context ends.
func (p *program) certificates(ctx context.Context, w *webhook, log *zap.Logger) (getCertificate, func(context.Context), error) {
	if w.certs != "" {
		files := k8s.CertFiles{Dir: w.certs}
		if _, err := files.Get(nil); err != nil {
			return nil, nil, err
		}
		return files.Get, func(ctx context.Context) { <-ctx.Done() }, nil
	}
	if w.own.Namespace == "" {
		text, err := os.ReadFile(filepath.Join(w.account, "namespace"))
		if err != nil {
			return nil, nil, fmt.Errorf("%w; --namespace says it too", err)
		}
		w.own.Namespace = strings.TrimSpace(string(text))
	}
	api, err := k8s.InCluster(p.getenv, w.account)
	if err != nil {
		return nil, nil, err
	}
	certs := k8s.NewCerts(api, w.own, log)
	if err := certs.Reconcile(ctx); err != nil {
		return nil, nil, fmt.Errorf("certificates: %w", err)
	}
	return certs.Get, certs.Run, nil
}
