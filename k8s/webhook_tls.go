package k8s

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
)

// CertFiles is a serving certificate that another program renews, such as
// cert-manager. It reads the files for each handshake; an API server makes few.
// It is safe for concurrent use.
type CertFiles struct {
	// Dir is the directory with tls.crt and tls.key, in PEM.
	Dir string

	last atomic.Pointer[tls.Certificate]
}

// Get is a function for tls.Config.GetCertificate. If the files cannot be read,
// for example while they are being replaced, it returns the previous
// certificate; it returns an error only if there is none.
func (f *CertFiles) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(f.Dir, "tls.crt"), filepath.Join(f.Dir, "tls.key"))
	if err == nil {
		f.last.Store(&pair)
		return &pair, nil
	}
	if was := f.last.Load(); was != nil {
		return was, nil
	}
	return nil, err
}

// ClientCA requires TLS clients to present a certificate that one of a set of
// CAs has signed. It is safe for concurrent use; its exported fields must not
// change once it is in use.
type ClientCA struct {
	// File holds the CA certificates, in PEM. It is read for each handshake.
	File string
	// Names are the accepted common names and DNS names of client certificates.
	// If it is empty, every name is accepted.
	Names []string

	last atomic.Pointer[x509.CertPool]
}

// pool returns the CAs. If the file cannot be read, for example while it is
// being replaced, it returns the previous ones.
func (c *ClientCA) pool() (*x509.CertPool, error) {
	text, err := os.ReadFile(c.File)
	if err == nil {
		pool := x509.NewCertPool()
		if pool.AppendCertsFromPEM(text) {
			c.last.Store(pool)
			return pool, nil
		}
		err = fmt.Errorf("%s: contains no PEM certificate", c.File)
	}
	if was := c.last.Load(); was != nil {
		return was, nil
	}
	return nil, err
}

// Require returns a copy of a server's config that requires such a certificate
// of each client. It returns an error if the file cannot be read or contains no
// certificate.
func (c *ClientCA) Require(server *tls.Config) (*tls.Config, error) {
	if _, err := c.pool(); err != nil {
		return nil, err
	}
	out := server.Clone()
	out.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		pool, err := c.pool()
		if err != nil {
			return nil, err
		}
		config := server.Clone()
		config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, pool
		config.VerifyConnection = c.verifyName
		return config, nil
	}
	return out, nil
}

// verifyName returns an error if a client's certificate has none of c.Names.
func (c *ClientCA) verifyName(s tls.ConnectionState) error {
	client := s.PeerCertificates[0]
	for _, name := range append([]string{client.Subject.CommonName}, client.DNSNames...) {
		if len(c.Names) == 0 || slices.Contains(c.Names, name) {
			return nil
		}
	}
	return errors.New("the client's certificate has none of the accepted names")
}
