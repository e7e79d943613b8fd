package policy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
)

// ListenTLS configures TLS for listen.grpc. Its files are read together with
// the config, so that a new certificate is a new config.
type ListenTLS struct {
	// Certificate is the server's certificate chain and key. Leaf is set.
	Certificate tls.Certificate
	// ClientCAs are the certificate authorities for clients' certificates. If
	// it is nil, clients need no certificate.
	ClientCAs *x509.CertPool

	files       [3]string // of the certificate, the key and the client CA
	clientNames []string
	patterns    []principalPattern // parsed clientNames
}

// maxCertFile is the maximum size of a certificate file in bytes.
const maxCertFile = 1 << 20

// AllowsClient returns an error if none of the URI and DNS names in a client's
// certificate matches client_names. It returns nil if there are no
// client_names. The certificate must have been verified by ClientCAs.
func (t *ListenTLS) AllowsClient(c *x509.Certificate) error {
	if len(t.patterns) == 0 {
		return nil
	}
	var names []string
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	names = append(names, c.DNSNames...)
	for _, name := range names {
		if anyOf(t.patterns, name, principalPattern.matches) {
			return nil
		}
	}
	return errors.New("no name in the client's certificate matches listen.tls.client_names")
}

// DNSName returns the first DNS name in the server's certificate, or "".
func (t *ListenTLS) DNSName() string {
	if names := t.Certificate.Leaf.DNSNames; len(names) > 0 {
		return names[0]
	}
	return ""
}

// same reports whether the fields are equal, whatever the files contain. Both
// may be nil.
func (t *ListenTLS) same(other *ListenTLS) bool {
	if t == nil || other == nil {
		return t == other
	}
	return t.files == other.files && strings.Join(t.clientNames, " ") == strings.Join(other.clientNames, " ")
}

var dnsPattern = regexp.MustCompile(`^[A-Za-z0-9.*_-]+$`)

// parseClientName parses a pattern for a name in a certificate: a URI or a DNS
// name.
func parseClientName(s string) (principalPattern, error) {
	if strings.Contains(s, "://") {
		return parsePrincipal(s)
	}
	if !dnsPattern.MatchString(s) {
		return nil, fmt.Errorf("invalid client name %q; want a URI such as spiffe://cluster.local/ns/gateways/*, or "+
			"a DNS name", s)
	}
	return strings.Split(s, "*"), nil
}

func (cr *configReader) readListenTLS(n node) {
	cr.listenTLSAt = n
	t := &ListenTLS{}
	var pem [3][]byte
	file := func(i int) func(node) {
		return func(n node) {
			name, ok := cr.text(n)
			if !ok {
				return
			}
			t.files[i] = cr.path(name)
			text, err := cr.inputs.read(t.files[i], maxCertFile)
			if err == nil && len(text) > maxCertFile {
				err = fmt.Errorf("%s has more than %d bytes", t.files[i], maxCertFile)
			}
			if err != nil {
				cr.wrong(n, "%v", err)
				return
			}
			pem[i] = text
		}
	}
	var caAt node
	before := len(cr.mistakes)
	cr.mapping(n, map[string]func(node){
		"cert_file":      file(0),
		"key_file":       file(1),
		"client_ca_file": func(n node) { caAt = n; file(2)(n) },
		"client_names": func(n node) {
			readStrings(&cr.reader, n, &t.patterns, func(s string) (principalPattern, error) {
				t.clientNames = append(t.clientNames, s)
				return parseClientName(s)
			})
		},
	})
	if len(cr.mistakes) > before {
		return
	}
	switch {
	case pem[0] == nil || pem[1] == nil:
		cr.wrong(n, "cert_file and key_file are both required")
		return
	case t.clientNames != nil && pem[2] == nil:
		cr.wrong(n, "client_names requires client_ca_file: without it clients need no certificate")
		return
	}
	var err error
	if t.Certificate, err = tls.X509KeyPair(pem[0], pem[1]); err != nil {
		// The error speaks of PEM blocks and algorithms; it does not quote the
		// key.
		cr.wrong(n, "%s and %s are not a certificate and its key: %v", t.files[0], t.files[1], err)
		return
	}
	if end := t.Certificate.Leaf.NotAfter; time.Now().After(end) {
		cr.warn(n, "the certificate in %s expired at %s, so clients reject it; renew it", t.files[0],
			end.UTC().Format(time.RFC3339))
	}
	if pem[2] != nil {
		t.ClientCAs = x509.NewCertPool()
		if !t.ClientCAs.AppendCertsFromPEM(pem[2]) {
			cr.wrong(caAt, "%s contains no PEM certificate", t.files[2])
			return
		}
	}
	cr.config.ListenTLS = t
}
