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

// webhook has the flags of `sluice webhook`.
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
		Long: `Run the mutating admission webhook that adds the sidecar to new pods, until SIGTERM or SIGINT.

It issues its own certificates from a CA in a Secret, and maintains the caBundle of its configuration. With --cert-dir
it uses tls.crt and tls.key from a directory instead, such as cert-manager's, and makes no requests to the cluster.`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := untilSignal(c.Context())
			defer stop()
			return p.runWebhook(ctx, &w)
		},
	}
	f := c.Flags()
	f.StringVar(&w.listen, "listen", ":9443", "`address` for admission reviews, host:port")
	f.StringVar(&w.metrics, "metrics", ":9003", "`address` for /metrics, /healthz and /readyz")
	w.sidecar.register(f)
	f.StringVar(&w.own.Namespace, "namespace", "", "`namespace` of the webhook (default: that of its service account)")
	f.StringVar(&w.own.Service, "service", "sluice-webhook", "`name` of the webhook's Service")
	f.StringVar(&w.own.Secret, "secret", "sluice-webhook-ca", "`name` of the Secret that holds the CA")
	f.StringVar(&w.own.Configuration, "config-name", "sluice", "`name` of the MutatingWebhookConfiguration")
	f.DurationVar(&w.own.Lifetime, "ca-life", 10*365*24*time.Hour,
		"`duration` that a CA is valid; it is replaced after four fifths of it")
	f.DurationVar(&w.own.Overlap, "ca-overlap", time.Hour, "`duration` in which both the old and the new CA are trusted")
	f.DurationVar(&w.own.Interval, "ca-check", time.Minute, "`interval` between checks of the CA")
	f.StringVar(&w.account, "service-account", "/var/run/secrets/kubernetes.io/serviceaccount",
		"`directory` with token, ca.crt and namespace")
	f.StringVar(&w.certs, "cert-dir", "",
		"`directory` with tls.crt and tls.key, reloaded when they change (default: issues its own)")
	f.StringVar(&w.client.File, "client-ca-file", "",
		"`file` with the CAs of clients, in PEM, reloaded when it changes; clients must have a certificate from them "+
			"(default: no certificate needed)")
	f.StringArrayVar(&w.client.Names, "client-name", nil,
		"`name` that a client's certificate must have as common name or DNS name; may be repeated (default: any)")
	f.DurationVar(&w.linger, "linger", 5*time.Second,
		"`duration` to keep answering on shutdown, until every API server has noticed")
	f.DurationVar(&w.grace, "grace", 10*time.Second, "`duration` that reviews in flight have to finish after --linger")
	f.StringVar(&w.logLevel, "log-level", "info", "`level`: debug, info, warn or error")
	return c
}

func (p *program) runWebhook(ctx context.Context, w *webhook) error {
	log, _, err := newLog(p.stderr, w.logLevel)
	if err != nil {
		return usageError{err}
	}
	if o := w.own; min(o.Lifetime, o.Overlap, o.Interval) <= 0 || o.Interval > o.Overlap/2 || o.Overlap > o.Lifetime/20 {
		return usageError{errors.New(
			"--ca-check must be at most half of --ca-overlap, and that at most a twentieth of --ca-life")}
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
		return fmt.Errorf("--listen: %w", trimSyscall(err))
	}
	defer func() { _ = reviews.Close() }()
	metrics, err := net.Listen("tcp", w.metrics)
	if err != nil {
		return fmt.Errorf("--metrics: %w", trimSyscall(err))
	}
	defer func() { _ = metrics.Close() }()

	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("/inject", k8s.Webhook(injection, log, registry))
	var draining atomic.Bool
	server := newServer(reviews, closeWhenDraining(&draining, mux), log, bounds{connections: 256})
	server.TLSConfig = tlsConfig
	status := http.NewServeMux()
	status.Handle("GET /metrics", scrapeHandler(registry, log, promhttp.HandlerOpts{}))
	status.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeStatus(w, http.StatusOK, "ok")
	})
	status.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if draining.Load() {
			writeStatus(w, http.StatusServiceUnavailable, "draining")
			return
		}
		writeStatus(w, http.StatusOK, "ok")
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
		// There is no event when the last API server has noticed that this
		// replica goes away, so it keeps answering for a while. The chart has no
		// preStop hook instead: API servers would keep their connections during
		// it, and the pods of an upgrade would wait for it.
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

// closeWhenDraining wraps h to close each connection after its next response
// once draining is true. Otherwise API servers would keep their HTTP/1.1
// connections, and a review that is sent while an idle connection is closed is
// lost.
func closeWhenDraining(draining *atomic.Bool, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if draining.Load() {
			w.Header().Set("Connection", "close")
		}
		h.ServeHTTP(w, r)
	})
}

// getCertificate is the type of tls.Config.GetCertificate.
type getCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error)

// certificates returns a function that returns the current certificate, which
// exists already, and one that keeps it valid until its context ends.
func (p *program) certificates(
	ctx context.Context, w *webhook, log *zap.Logger,
) (getCertificate, func(context.Context), error) {
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
			return nil, nil, fmt.Errorf("%w; set --namespace instead", err)
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
