package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"

	"go.uber.org/zap"
	"google.golang.org/grpc/credentials"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// serverTLS returns the TLS config of the gRPC server. Each handshake uses the
// config that current returns, so that new certificates need no restart.
func serverTLS(current func() *policy.Config) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return listenTLS(current().ListenTLS), nil
		},
	}
}

// listenTLS returns the TLS config for listen.tls.
func listenTLS(t *policy.ListenTLS) *tls.Config {
	c := &tls.Config{
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"h2"},
		Certificates: []tls.Certificate{t.Certificate},
		// A resumed session would be authenticated by a certificate that may no
		// longer be valid. Envoy keeps its connections, so it loses little.
		SessionTicketsDisabled: true,
	}
	if t.ClientCAs != nil {
		c.ClientAuth = tls.RequireAnyClientCert // verifyClient verifies it
		c.ClientCAs = t.ClientCAs
		c.VerifyConnection = func(s tls.ConnectionState) error { return verifyClient(t, s.PeerCertificates) }
	}
	return c
}

// verifyClient returns an error if the client is not allowed: its certificate is
// not from the client CAs, has expired, or has none of the names. The server's
// own certificate is always allowed: `sluice healthcheck` presents it.
func verifyClient(t *policy.ListenTLS, chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("the client has no certificate")
	}
	if bytes.Equal(chain[0].Raw, t.Certificate.Certificate[0]) {
		return nil
	}
	o := x509.VerifyOptions{
		Roots: t.ClientCAs, Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	if _, err := chain[0].Verify(o); err != nil {
		return err
	}
	return t.AllowsClient(chain[0])
}

// loggedTLS logs failed handshakes, a few per minute. gRPC does not log them.
type loggedTLS struct {
	credentials.TransportCredentials
	log *throttledLog
}

func newLoggedTLS(c *tls.Config, log *zap.Logger) loggedTLS {
	return loggedTLS{credentials.NewTLS(c), &throttledLog{log: log}}
}

// ServerHandshake implements credentials.TransportCredentials.
func (c loggedTLS) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		_, _ = fmt.Fprintf(c.log, "gRPC: TLS handshake error from %v: %v\n", raw.RemoteAddr(), err)
	}
	return conn, info, err
}

// Clone implements credentials.TransportCredentials.
func (c loggedTLS) Clone() credentials.TransportCredentials {
	return loggedTLS{c.TransportCredentials.Clone(), c.log}
}

// ownTLS returns the TLS config of `sluice healthcheck`: it presents the server's
// own certificate, and expects the same certificate from the server.
func ownTLS(certFile, keyFile string) (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2"},
		// The server asks for a certificate from its client CAs. Its own
		// certificate need not be from one of them.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &own, nil },
		InsecureSkipVerify:   true, // VerifyConnection compares the certificates
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 || !bytes.Equal(s.PeerCertificates[0].Raw, own.Certificate[0]) {
				return fmt.Errorf("the server's certificate is not the one in %s", certFile)
			}
			return nil
		},
	}, nil
}
