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

// serverTLS is TLS for gRPC as the config in force has it: each handshake takes the config that current returns, so that new
// certificates need no restart.
func serverTLS(current func() *policy.Config) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return listenTLS(current().ListenTLS), nil
		},
	}
}

func listenTLS(t *policy.ListenTLS) *tls.Config {
	c := &tls.Config{
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"h2"},
		Certificates: []tls.Certificate{t.Certificate},
		// A resumed session would be that of a certificate that may have been withdrawn. Envoy keeps its connections.
		SessionTicketsDisabled: true,
	}
	if t.ClientCAs != nil {
		c.ClientAuth = tls.RequireAnyClientCert // and which ones is for verifyClient to say
		c.ClientCAs = t.ClientCAs
		c.VerifyConnection = func(s tls.ConnectionState) error { return verifyClient(t, s.PeerCertificates) }
	}
	return c
}

// verifyClient reports why a client may not ask: its certificate is from none of the client CAs, has expired, or has none of the
// names. Who holds the server's own key may ask in any case: it is `sluice healthcheck`, which has no certificate of its own.
func verifyClient(t *policy.ListenTLS, chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("the client has no certificate")
	}
	if bytes.Equal(chain[0].Raw, t.Certificate.Certificate[0]) {
		return nil
	}
	o := x509.VerifyOptions{Roots: t.ClientCAs, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	if _, err := chain[0].Verify(o); err != nil {
		return err
	}
	return t.AllowsClient(chain[0])
}

// loggedTLS logs handshakes that fail, a few a minute. gRPC itself says nothing of them.
type loggedTLS struct {
	credentials.TransportCredentials
	log *seldomLog
}

func newLoggedTLS(c *tls.Config, log *zap.Logger) loggedTLS {
	return loggedTLS{credentials.NewTLS(c), &seldomLog{log: log}}
}

// ServerHandshake is credentials.TransportCredentials'.
func (c loggedTLS) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		_, _ = fmt.Fprintf(c.log, "gRPC: TLS handshake error from %v: %v\n", raw.RemoteAddr(), err)
	}
	return conn, info, err
}

// Clone is credentials.TransportCredentials'.
func (c loggedTLS) Clone() credentials.TransportCredentials {
	return loggedTLS{c.TransportCredentials.Clone(), c.log}
}

// ownTLS is how `sluice healthcheck` asks a server by TLS: with the server's own certificate and key, which only who may read them has,
// and of a server that shows the same certificate.
func ownTLS(certFile, keyFile string) (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2"},
		// The server names the CAs of its clients, and its own certificate need not be from one of them.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &own, nil },
		InsecureSkipVerify:   true, // the certificate is compared with the one that it must be
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 || !bytes.Equal(s.PeerCertificates[0].Raw, own.Certificate[0]) {
				return fmt.Errorf("the server's certificate is not the one in %s", certFile)
			}
			return nil
		},
	}, nil
}
