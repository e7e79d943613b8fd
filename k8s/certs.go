package k8s

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// CertOptions say where the webhook's certificates live. A duration that is zero is the default.
type CertOptions struct {
	Namespace     string        // the webhook's own
	Service       string        // the Service that the API server asks
	Secret        string        // holds the CA, in Namespace; made where it is not there
	Configuration string        // the MutatingWebhookConfiguration whose caBundle is kept
	Lifetime      time.Duration // a CA's; default ten years
	Overlap       time.Duration // how long a new CA is believed before it signs, and an old one after; default an hour
	Interval      time.Duration // between two looks at the cluster; default a minute
}

const servingLifetime = 24 * time.Hour

// Certs are the webhook's certificates, made by itself: a CA in a Secret, which all replicas share, and short-lived serving
// certificates that are never written anywhere.
//
// A CA is replaced in three steps, so that at no moment a replica serves what the API server does not believe: the next one is put
// beside it and into caBundle; an Overlap later it signs; another Overlap later the old one is forgotten. Each replica looks each
// Every, which is far less than an Overlap. Who comes second with a step is told so by the Secret's resourceVersion.
type Certs struct {
	api     *API
	o       CertOptions
	log     *zap.Logger
	serving atomic.Pointer[tls.Certificate]
	issuer  []byte // the CA that signed it
	host    string // whom the API server asks
}

// NewCerts returns certificates that are there once Step has returned nil.
func NewCerts(api *API, o CertOptions, log *zap.Logger) *Certs {
	if o.Lifetime == 0 {
		o.Lifetime = 10 * 365 * 24 * time.Hour
	}
	if o.Overlap == 0 {
		o.Overlap = time.Hour
	}
	if o.Interval == 0 {
		o.Interval = time.Minute
	}
	return &Certs{api: api, o: o, log: log, host: o.Service + "." + o.Namespace + ".svc"}
}

// Get is for tls.Config.GetCertificate.
func (c *Certs) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if s := c.serving.Load(); s != nil {
		return s, nil
	}
	return nil, errors.New("there is no certificate yet")
}

// Run looks at the cluster until ctx ends. An error is logged, and what is there serves on.
func (c *Certs) Run(ctx context.Context) {
	tick := time.NewTicker(c.o.Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := c.Reconcile(ctx); err != nil && ctx.Err() == nil {
			c.log.Error("certificates: the cluster cannot be asked, what is there serves on", zap.Error(err))
		}
	}
}

// The Secret's keys.
const (
	caCertKey, caPrivateKey     = "ca.crt", "ca.key"
	nextCertKey, nextPrivateKey = "next.crt", "next.key"
	oldCertKey                  = "old.crt"
	rotatedKey                  = "changed" // when the last step was taken, RFC 3339
)

type secret struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   object            `json:"metadata"`
	Type       string            `json:"type,omitempty"`
	Data       map[string][]byte `json:"data"`
}

// Step brings the Secret, the webhook's configuration and the serving certificate to where they should be now. It is not safe for
// concurrent use.
func (c *Certs) Reconcile(ctx context.Context) error {
	s, err := c.reconcileSecret(ctx)
	if err != nil {
		return err
	}
	bundle := bytes.Join([][]byte{s.Data[caCertKey], s.Data[nextCertKey], s.Data[oldCertKey]}, nil)
	if err := c.publishCABundle(ctx, bundle); err != nil {
		return err
	}
	return c.ensureServingCert(s.Data[caCertKey], s.Data[caPrivateKey])
}

// current returns the Secret, after the step that is due.
func (c *Certs) reconcileSecret(ctx context.Context) (*secret, error) {
	path := "/api/v1/namespaces/" + c.o.Namespace + "/secrets"
	for range 5 {
		var s secret
		err := c.api.call(ctx, http.MethodGet, path+"/"+c.o.Secret, nil, &s)
		method, to := http.MethodPut, path+"/"+c.o.Secret
		if hasStatus(err, http.StatusNotFound) {
			method, to = http.MethodPost, path
			s = secret{APIVersion: "v1", Kind: "Secret", Metadata: object{"name": c.o.Secret, "namespace": c.o.Namespace}, Type: "Opaque"}
		} else if err != nil {
			return nil, err
		}
		due, err := c.advanceRotation(&s)
		if err != nil || !due {
			return &s, err
		}
		var stored secret
		err = c.api.call(ctx, method, to, s, &stored)
		if err == nil {
			return &stored, nil
		}
		if !hasStatus(err, http.StatusConflict) { // where another replica was faster, its step counts
			return nil, err
		}
	}
	return nil, errors.New("the CA's Secret changes all the time")
}

// advance takes the step that is due, and says whether one was.
func (c *Certs) advanceRotation(s *secret) (bool, error) {
	now := time.Now()
	if s.Data == nil {
		s.Data = map[string][]byte{}
	}
	since, ahead := time.Duration(1<<63-1), false
	if t, err := time.Parse(time.RFC3339Nano, string(s.Data[rotatedKey])); err == nil {
		since = now.Sub(t)
		ahead = since < -c.o.Interval // by a clock that was wrong: counted from now, or the next step would never be due
	}
	ca, err := tls.X509KeyPair(s.Data[caCertKey], s.Data[caPrivateKey])
	if err == nil && len(s.Data[nextCertKey]) > 0 {
		if _, err := tls.X509KeyPair(s.Data[nextCertKey], s.Data[nextPrivateKey]); err != nil { // another is made
			delete(s.Data, nextCertKey)
			delete(s.Data, nextPrivateKey)
		}
	}
	switch {
	case err != nil && len(s.Data[caCertKey]) > 0:
		return false, fmt.Errorf("Secret %s/%s: %w; take its data away, and a new CA is made", c.o.Namespace, c.o.Secret, err)
	case err != nil || now.After(ca.Leaf.NotAfter): // what it signed is believed by nobody
		for _, key := range []string{nextCertKey, nextPrivateKey, oldCertKey} {
			delete(s.Data, key)
		}
		s.Data[caCertKey], s.Data[caPrivateKey], err = newCA(now, c.o.Lifetime)
	case ahead:
	case len(s.Data[nextCertKey]) > 0:
		if since < c.o.Overlap {
			return false, nil
		}
		s.Data[oldCertKey] = s.Data[caCertKey]
		s.Data[caCertKey], s.Data[caPrivateKey] = s.Data[nextCertKey], s.Data[nextPrivateKey]
		delete(s.Data, nextCertKey)
		delete(s.Data, nextPrivateKey)
	case len(s.Data[oldCertKey]) > 0:
		if since < c.o.Overlap {
			return false, nil
		}
		delete(s.Data, oldCertKey)
	case ca.Leaf.NotAfter.Sub(now) < c.o.Lifetime/5:
		s.Data[nextCertKey], s.Data[nextPrivateKey], err = newCA(now, c.o.Lifetime)
	default:
		return false, nil
	}
	s.Data[rotatedKey] = []byte(now.UTC().Format(time.RFC3339Nano))
	return true, err
}

// publish writes the bundle into the webhook's configuration, where it is another.
func (c *Certs) publishCABundle(ctx context.Context, bundle []byte) error {
	path := "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/" + c.o.Configuration
	for range 5 {
		var configuration struct {
			Metadata struct {
				ResourceVersion string `json:"resourceVersion"`
			} `json:"metadata"`
			Webhooks []struct {
				ClientConfig struct {
					CABundle []byte `json:"caBundle"`
				} `json:"clientConfig"`
			} `json:"webhooks"`
		}
		if err := c.api.call(ctx, http.MethodGet, path, nil, &configuration); err != nil {
			return err
		}
		patch := []object{{"op": "test", "path": "/metadata/resourceVersion", "value": configuration.Metadata.ResourceVersion}}
		for i, w := range configuration.Webhooks {
			if !bytes.Equal(w.ClientConfig.CABundle, bundle) {
				patch = append(patch, object{"op": "add", "path": fmt.Sprintf("/webhooks/%d/clientConfig/caBundle", i), "value": bundle})
			}
		}
		if len(patch) == 1 {
			return nil
		}
		var out object
		err := c.api.call(ctx, http.MethodPatch, path, patch, &out)
		if !hasStatus(err, http.StatusConflict) && !hasStatus(err, http.StatusUnprocessableEntity) {
			return err
		}
	}
	return errors.New("the webhook's configuration changes all the time")
}

// sign makes a new serving certificate, where the one that is there is of another CA or past half of its life.
func (c *Certs) ensureServingCert(certificate, key []byte) error {
	if s := c.serving.Load(); s != nil && bytes.Equal(c.issuer, certificate) && time.Until(s.Leaf.NotAfter) > servingLifetime/2 {
		return nil
	}
	ca, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return err
	}
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: newSerial(),
		Subject:      pkix.Name{CommonName: c.host},
		NotBefore:    now.Add(-time.Hour), // clocks differ
		NotAfter:     now.Add(servingLifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(c.host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{c.host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Leaf, own.Public(), ca.PrivateKey)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	c.serving.Store(&tls.Certificate{Certificate: [][]byte{der}, PrivateKey: own, Leaf: leaf})
	c.issuer = certificate
	c.log.Info("a new serving certificate", zap.Time("until", leaf.NotAfter))
	return nil
}

// newCA returns a certificate and its key, in PEM.
func newCA(now time.Time, life time.Duration) (certificate, key []byte, err error) {
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	number := newSerial()
	template := &x509.Certificate{
		SerialNumber: number,
		// Each has a name of its own, by which a verifier picks the right one out of a bundle.
		Subject:               pkix.Name{CommonName: fmt.Sprintf("sluice webhook CA %x", number)},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageCertSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, own.Public(), own)
	if err != nil {
		return nil, nil, err
	}
	text, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: text}), nil
}

func newSerial() *big.Int {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b[:])
}

// CertFiles are certificates that others keep, as cert-manager does: tls.crt and tls.key in Dir, reread for each handshake, of which
// an API server makes few. It is safe for concurrent use.
type CertFiles struct {
	Dir  string
	last atomic.Pointer[tls.Certificate]
}

// Get is for tls.Config.GetCertificate. While files are being replaced it returns what it had last.
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

// ClientCA lets in only those TLS clients that show a certificate of a CA in
// File, which is reread for each handshake. Where Names has any, the common
// name or a DNS name of the certificate must be one of them. It is safe for
// concurrent use.
type ClientCA struct {
	File  string
	Names []string
	last  atomic.Pointer[x509.CertPool]
}

// pool returns the CAs; while the file is being replaced, those that it had.
func (c *ClientCA) pool() (*x509.CertPool, error) {
	text, err := os.ReadFile(c.File)
	if err == nil {
		pool := x509.NewCertPool()
		if pool.AppendCertsFromPEM(text) {
			c.last.Store(pool)
			return pool, nil
		}
		err = fmt.Errorf("%s holds no certificate in PEM", c.File)
	}
	if was := c.last.Load(); was != nil {
		return was, nil
	}
	return nil, err
}

// Require returns a copy of a server's config that lets in nobody else. Its
// error says what is wrong with the file.
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
		config.ClientAuth, config.ClientCAs, config.VerifyConnection = tls.RequireAndVerifyClientCert, pool, c.verifyName
		return config, nil
	}
	return out, nil
}

// named refuses a client by its names.
func (c *ClientCA) verifyName(s tls.ConnectionState) error {
	client := s.PeerCertificates[0]
	for _, name := range append([]string{client.Subject.CommonName}, client.DNSNames...) {
		if len(c.Names) == 0 || slices.Contains(c.Names, name) {
			return nil
		}
	}
	return errors.New("the client's certificate has none of the names that are let in")
}
