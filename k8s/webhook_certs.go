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
	"math"
	"math/big"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// CertOptions configure Certs. The names are required; a duration of zero
// stands for its default.
type CertOptions struct {
	// Namespace is the webhook's own namespace.
	Namespace string
	// Service is the name of the Service by which API servers call the webhook.
	Service string
	// Secret is the name of the Secret that holds the CA, in Namespace. It is
	// created if it does not exist.
	Secret string
	// Configuration is the name of the MutatingWebhookConfiguration whose
	// caBundle is kept up to date.
	Configuration string
	// Lifetime is how long a CA is valid; default ten years. A new one is
	// created once less than a fifth of it is left.
	Lifetime time.Duration
	// Overlap is how long a new CA is trusted before it signs, and an old one
	// after it has signed last; default one hour.
	Overlap time.Duration
	// Interval is the time between two calls of Reconcile; default one minute.
	// It must be much shorter than Overlap.
	Interval time.Duration
}

// servingLifetime is how long a serving certificate is valid. It is replaced
// after half of that.
const servingLifetime = 24 * time.Hour

// maxConflicts is how often an update is tried that conflicts with others.
const maxConflicts = 5

// Certs issues the webhook's certificates: a CA in a Secret that all replicas
// share, and short-lived serving certificates that stay in memory.
//
// A CA is replaced in three steps, so that no replica ever serves a certificate
// that the API server does not trust:
//
//  1. The next CA is stored beside the current one and added to caBundle.
//  2. After Overlap it becomes the current CA and signs serving certificates.
//  3. After another Overlap the old CA is removed.
//
// Every replica checks which step is due at each Interval. If two take the same
// step, the Secret's resourceVersion makes the second one fail and read again.
type Certs struct {
	api     *API
	o       CertOptions
	log     *zap.Logger
	serving atomic.Pointer[tls.Certificate]
	issuer  []byte // the CA certificate that signed serving, in PEM
	host    string // the host name by which API servers call the webhook
}

// NewCerts returns a Certs without a certificate; the first Reconcile issues
// one.
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

// Get is a function for tls.Config.GetCertificate. It returns an error until
// Reconcile has issued the first certificate. It is safe for concurrent use.
func (c *Certs) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if s := c.serving.Load(); s != nil {
		return s, nil
	}
	return nil, errors.New("no serving certificate has been issued yet")
}

// Run calls Reconcile at each Interval until ctx ends. It logs errors, and keeps
// the current certificate meanwhile.
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
			c.log.Error("certificate check failed, keeping the current certificate", zap.Error(err))
		}
	}
}

// Keys of the Secret's data. Certificates and private keys are in PEM.
const (
	caCertKey, caPrivateKey     = "ca.crt", "ca.key"
	nextCertKey, nextPrivateKey = "next.crt", "next.key"
	oldCertKey                  = "old.crt"
	rotatedKey                  = "changed" // the time of the last step, in RFC 3339
)

// secret is a Secret of the core API.
type secret struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   object            `json:"metadata"`
	Type       string            `json:"type,omitempty"`
	Data       map[string][]byte `json:"data"`
}

// Reconcile takes the step that is due, if any, updates caBundle, and issues a
// serving certificate if the current one is from another CA or past half of its
// lifetime. It returns errors of the API server, and an error if the Secret
// does not hold a valid CA. It is not safe for concurrent use.
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

// reconcileSecret takes the step that is due, and returns the Secret as stored.
func (c *Certs) reconcileSecret(ctx context.Context) (*secret, error) {
	path := "/api/v1/namespaces/" + c.o.Namespace + "/secrets"
	for range maxConflicts {
		var s secret
		err := c.api.call(ctx, http.MethodGet, path+"/"+c.o.Secret, nil, &s)
		method, to := http.MethodPut, path+"/"+c.o.Secret
		if hasStatus(err, http.StatusNotFound) {
			method, to = http.MethodPost, path
			s = secret{
				APIVersion: "v1", Kind: "Secret", Type: "Opaque",
				Metadata: object{"name": c.o.Secret, "namespace": c.o.Namespace},
			}
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
		if !hasStatus(err, http.StatusConflict) { // after a conflict, read what another replica has stored
			return nil, err
		}
	}
	return nil, fmt.Errorf("update of Secret %s/%s: giving up after %d conflicts", c.o.Namespace, c.o.Secret,
		maxConflicts)
}

// advanceRotation takes the step that is due in s, and reports whether one was.
func (c *Certs) advanceRotation(s *secret) (bool, error) {
	now := time.Now()
	if s.Data == nil {
		s.Data = map[string][]byte{}
	}
	since, ahead := time.Duration(math.MaxInt64), false
	if t, err := time.Parse(time.RFC3339Nano, string(s.Data[rotatedKey])); err == nil {
		since = now.Sub(t)
		// A wrong clock may have stored a time in the future. It is replaced by
		// the present time, as no step would be due before it.
		ahead = since < -c.o.Interval
	}
	ca, err := tls.X509KeyPair(s.Data[caCertKey], s.Data[caPrivateKey])
	if err == nil && len(s.Data[nextCertKey]) > 0 {
		if _, err := tls.X509KeyPair(s.Data[nextCertKey], s.Data[nextPrivateKey]); err != nil { // a new one is created
			delete(s.Data, nextCertKey)
			delete(s.Data, nextPrivateKey)
		}
	}
	switch {
	case err != nil && len(s.Data[caCertKey]) > 0:
		return false, fmt.Errorf("Secret %s/%s: invalid CA: %w; remove the Secret's data to have a new CA created",
			c.o.Namespace, c.o.Secret, err)
	case err != nil || now.After(ca.Leaf.NotAfter): // there is no CA, or an expired one that nobody trusts
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

// publishCABundle writes the bundle into the webhook's configuration if that
// has another one.
func (c *Certs) publishCABundle(ctx context.Context, bundle []byte) error {
	path := "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/" + c.o.Configuration
	for range maxConflicts {
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
		patch := []object{{
			"op": "test", "path": "/metadata/resourceVersion", "value": configuration.Metadata.ResourceVersion,
		}}
		for i, w := range configuration.Webhooks {
			if !bytes.Equal(w.ClientConfig.CABundle, bundle) {
				path := fmt.Sprintf("/webhooks/%d/clientConfig/caBundle", i)
				patch = append(patch, object{"op": "add", "path": path, "value": bundle})
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
	return fmt.Errorf("update of MutatingWebhookConfiguration %s: giving up after %d conflicts",
		c.o.Configuration, maxConflicts)
}

// ensureServingCert issues a serving certificate if the current one is from
// another CA or past half of its lifetime.
func (c *Certs) ensureServingCert(certificate, key []byte) error {
	s := c.serving.Load()
	if s != nil && bytes.Equal(c.issuer, certificate) && time.Until(s.Leaf.NotAfter) > servingLifetime/2 {
		return nil
	}
	ca, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return err
	}
	servingKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: newSerial(),
		Subject:      pkix.Name{CommonName: c.host},
		NotBefore:    now.Add(-time.Hour), // the API server's clock may be behind
		NotAfter:     now.Add(servingLifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(c.host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{c.host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Leaf, servingKey.Public(), ca.PrivateKey)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	c.serving.Store(&tls.Certificate{Certificate: [][]byte{der}, PrivateKey: servingKey, Leaf: leaf})
	c.issuer = certificate
	c.log.Info("serving certificate issued", zap.Time("expires", leaf.NotAfter))
	return nil
}

// newCA returns a new CA certificate and its private key, in PEM.
func newCA(now time.Time, life time.Duration) (certificate, key []byte, err error) {
	privateKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial := newSerial()
	template := &x509.Certificate{
		SerialNumber: serial,
		// A unique name lets verifiers find the right CA in a bundle.
		Subject:               pkix.Name{CommonName: fmt.Sprintf("sluice webhook CA %x", serial)},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageCertSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, privateKey.Public(), privateKey)
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(privateKey)
	if err != nil {
		return nil, nil, err
	}
	certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	return certificate, key, nil
}

// newSerial returns a random serial number of 127 bits.
func newSerial() *big.Int {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b[:])
}
