package policy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
)

// ListenTLS is how listen.grpc speaks TLS. What its files hold is read with the config, so that a new certificate comes into force as a
// new config does.
type ListenTLS struct {
	// Certificate is the server's, with its chain and key.
	Certificate tls.Certificate
	// ClientCAs sign the certificates of clients. Where it is nil clients need none.
	ClientCAs *x509.CertPool

	files       [3]string // certificate, key and client CA
	clientNames []string
	patterns    []principalPattern // of clientNames
}

// maxCertFile is how many bytes a file with certificates may have.
const maxCertFile = 1 << 20

// AllowsClient reports why a client whose certificate is from one of ClientCAs may not ask: none of its URI and DNS names is one
// of client_names. Without client_names every client may.
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
	return errors.New("no name in the client's certificate is one of listen.tls.client_names")
}

// DNSName is a DNS name in the server's certificate, or "".
func (t *ListenTLS) DNSName() string {
	if names := t.Certificate.Leaf.DNSNames; len(names) > 0 {
		return names[0]
	}
	return ""
}

// same reports whether the fields, not the files' contents, are the same. Both may be nil.
func (t *ListenTLS) same(other *ListenTLS) bool {
	if t == nil || other == nil {
		return t == other
	}
	return t.files == other.files && strings.Join(t.clientNames, " ") == strings.Join(other.clientNames, " ")
}

var dnsPattern = regexp.MustCompile(`^[A-Za-z0-9.*_-]+$`)

// parseClientName reads a pattern of a certificate's name: a URI, or a DNS name.
func parseClientName(s string) (principalPattern, error) {
	if strings.Contains(s, "://") {
		return parsePrincipal(s)
	}
	if !dnsPattern.MatchString(s) {
		return nil, fmt.Errorf("%q is no name of a client; write a URI such as spiffe://cluster.local/ns/gateways/*, or a DNS name", s)
	}
	return strings.Split(s, "*"), nil
}

func (f *configFile) readListenTLS(n node) {
	f.listenTLSAt = n
	t := &ListenTLS{}
	var pem [3][]byte
	file := func(i int) func(node) {
		return func(n node) {
			name, ok := f.text(n)
			if !ok {
				return
			}
			t.files[i] = f.path(name)
			text, err := f.inputs.read(t.files[i], maxCertFile)
			if err == nil && len(text) > maxCertFile {
				err = fmt.Errorf("%s: more than %d bytes", t.files[i], maxCertFile)
			}
			if err != nil {
				f.wrong(n, "%v", err)
				return
			}
			pem[i] = text
		}
	}
	var caAt node
	before := len(f.mistakes)
	ok := f.mapping(n, map[string]func(node){
		"cert_file":      file(0),
		"key_file":       file(1),
		"client_ca_file": func(n node) { caAt = n; file(2)(n) },
		"client_names": func(n node) {
			texts(&f.reader, n, &t.patterns, func(s string) (principalPattern, error) {
				t.clientNames = append(t.clientNames, s)
				return parseClientName(s)
			})
		},
	})
	if !ok || len(f.mistakes) > before {
		return
	}
	switch {
	case pem[0] == nil || pem[1] == nil:
		f.wrong(n, "cert_file and key_file are both required")
		return
	case t.clientNames != nil && pem[2] == nil:
		f.wrong(n, "client_names requires client_ca_file: without it clients need no certificate")
		return
	}
	var err error
	if t.Certificate, err = tls.X509KeyPair(pem[0], pem[1]); err != nil {
		// The error speaks of PEM blocks and algorithms, and quotes nothing of the key.
		f.wrong(n, "%s and %s are no certificate with its key: %v", t.files[0], t.files[1], err)
		return
	}
	if end := t.Certificate.Leaf.NotAfter; time.Now().After(end) {
		f.warn(n, "the certificate in %s expired at %s: clients refuse it", t.files[0], end.UTC().Format(time.RFC3339))
	}
	if pem[2] != nil {
		t.ClientCAs = x509.NewCertPool()
		if !t.ClientCAs.AppendCertsFromPEM(pem[2]) {
			f.wrong(caAt, "%s holds no certificate in PEM", t.files[2])
			return
		}
	}
	f.config.ListenTLS = t
}

// readRoutes reads what Envoy's routes may bring.
func (f *configFile) readRoutes(n node) {
	f.mapping(n, map[string]func(node){
		"limits": func(n node) {
			limits, ok := n.Node.(*ast.BoolNode)
			if !ok {
				f.wrong(n, "%s; wanted is true or false", describe(n.Node))
				return
			}
			f.config.noRouteLimits = !limits.Value
		},
		"domains": func(n node) {
			texts(&f.reader, n, &f.config.routeDomains, func(s string) (string, error) { return s, checkDomain(s) })
		},
	})
}

// leaveOut keeps a value that is a secret, or holds one, out of the config's hash; instead is what stands for it there.
func (f *configFile) leaveOut(n node, instead string) {
	t := n.GetToken()
	if l, ok := n.Node.(*ast.LiteralNode); ok {
		t = l.Value.GetToken()
	}
	if t != nil && t.Position != nil {
		f.hidden[[2]int{t.Position.Line, t.Position.Column}] = instead
	}
}

// say adds the config's text to what its hash is of, but for what is hidden: whoever can read the hash could try secrets one after
// another.
func (f *configFile) say(text []byte) {
	for _, t := range lexer.Tokenize(string(text)) {
		value := t.Value
		if instead, ok := f.hidden[[2]int{t.Position.Line, t.Position.Column}]; ok {
			value = instead
		}
		_, _ = fmt.Fprintf(f.inputs.said, "%q ", value)
	}
}

// withoutUser is a URL without its user and password, or "" where it is none.
func withoutUser(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return ""
	}
	u.User, u.RawQuery = nil, ""
	return u.String()
}

// shortSecret is the length in bytes below which a key_secret is warned of.
const shortSecret = 16

// warnOfAdmin warns of an admin listener that everybody can reach: its page and profiles show what is asked and by whom.
func (f *configFile) warnOfAdmin(n node, addr string) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return // a mistake that was noted
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		f.warn(n, "%s is on all addresses, for everybody who can reach this machine; write 127.0.0.1 and use kubectl port-forward", addr)
	}
}

// warnOfReaders warns of a secret's file that every user of the machine can read.
func (f *configFile) warnOfReaders(n node, file string) {
	if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o004 != 0 {
		f.warn(n, "%s can be read by every user (mode %#o); write chmod o-r, or defaultMode: 0440 for a Secret's volume", file, info.Mode().Perm())
	}
}
