package authz

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/trace"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// What a request holds travels to its end in a text that Envoy keeps: the check
// writes it into the dynamic metadata, and the access log brings it back. The
// text is encrypted, since it has the keys of buckets, and authenticated: only a
// sidecar that has the key can return tokens to a bucket.

// maxSealed is the maximum length of a sealed text in bytes.
const maxSealed = 4096

// sealVersion is the first byte of every sealed text.
const sealVersion = 1

// spanSize is the length in bytes of the context of a span: the IDs of its trace
// and of itself. They are zero if the check was not traced.
const spanSize = 16 + 8

// saltSize is the length of the salt in bytes. A process has one, so that the
// number of texts that are sealed with one key is bounded by its life.
const saltSize = 16

// maxCiphers is how many ciphers are kept, this process's and those of others.
const maxCiphers = 256

// sealer seals and opens texts. It is safe for concurrent use.
type sealer struct {
	salt [saltSize]byte
	// own is the secret of this process, for configs without key_secret.
	own [32]byte

	last atomic.Pointer[sealing] // of the config that was used last

	mu sync.Mutex
	// ciphers has the ciphers by secret and salt.
	ciphers map[cipherID]cipher.AEAD
}

// sealing is what a config says of sealed texts.
type sealing struct {
	config *policy.Config
	secret []byte
	hash   [sha256.Size]byte // of the secret
	place  []byte            // what a text is good for: a domain, a store and a prefix
}

// of returns what a config says of sealed texts.
func (s *sealer) of(config *policy.Config) *sealing {
	if known := s.last.Load(); known != nil && known.config == config {
		return known
	}
	k := &sealing{config: config, secret: config.SettleSecret(), place: place(config)}
	if k.secret == nil {
		k.secret = s.own[:]
	}
	k.hash = sha256.Sum256(k.secret)
	s.last.Store(k)
	return k
}

type cipherID struct {
	secret [sha256.Size]byte // its hash
	salt   [saltSize]byte
}

func newSealer() *sealer {
	s := &sealer{ciphers: make(map[cipherID]cipher.AEAD)}
	_, _ = rand.Read(s.salt[:]) // never fails
	_, _ = rand.Read(s.own[:])
	return s
}

// cipher returns the cipher for a config and a salt. isNew says that it is not
// kept.
func (s *sealer) cipher(k *sealing, salt [saltSize]byte) (c cipher.AEAD, isNew bool, err error) {
	s.mu.Lock()
	c, ok := s.ciphers[cipherID{k.hash, salt}]
	s.mu.Unlock()
	if ok {
		return c, false, nil
	}
	key, err := hkdf.Key(sha256.New, k.secret, salt[:], "sluice settle", 32)
	if err != nil {
		return nil, false, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, false, err
	}
	c, err = cipher.NewGCMWithRandomNonce(block)
	return c, true, err
}

// keep keeps a cipher that has sealed or opened a text: not those of forged
// texts, of which there may be any number.
func (s *sealer) keep(k *sealing, salt [saltSize]byte, c cipher.AEAD) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := cipherID{k.hash, salt}
	if len(s.ciphers) >= maxCiphers {
		clear(s.ciphers)
	}
	s.ciphers[id] = c
}

// place names a domain, a store and a prefix.
func place(config *policy.Config) []byte {
	where := "memory"
	if r := config.Redis; r != nil {
		where = strings.Join(append([]string{r.URL, r.Master}, r.Addresses...), "\x00")
	}
	sum := sha256.Sum256([]byte(config.Domain + "\x00" + config.KeyPrefix() + "\x00" + where))
	return sum[:]
}

// held is what one charge of a request holds.
type held struct {
	domain, limit string
	key           string // of the bucket, in the store
	hold          limiter.Hold
}

// seal returns the sealed text of what a request holds, with the context of the
// check's span. It leaves out what does not fit, and returns how many that are.
// The text is empty if nothing is held.
func (s *sealer) seal(check *checkState) (text string, left int) {
	config, d := check.config, &check.decision
	first := 0
	for first < len(d.Charges) && d.Verdicts[first].Hold.IsZero() {
		first++
	}
	if first == len(d.Charges) {
		return "", 0
	}
	var plain []byte
	var span [spanSize]byte
	if check.span != nil {
		if c := check.span.SpanContext(); c.IsSampled() {
			id, parent := c.TraceID(), c.SpanID()
			copy(span[copy(span[:], id[:]):], parent[:])
		}
	}
	plain = append(plain, span[:]...)
	prefix := config.KeyPrefix() + ":"
	for i := first; i < len(d.Charges); i++ {
		hold := d.Verdicts[i].Hold
		if hold.IsZero() {
			continue
		}
		key := strings.TrimPrefix(d.Charges[i].Key, prefix)
		if sealedSize(len(plain)+2+len(key)+limiter.HoldBytes) > maxSealed {
			left++
			continue
		}
		plain = binary.BigEndian.AppendUint16(plain, uint16(len(key)))
		plain = append(plain, key...)
		plain, _ = hold.AppendBinary(plain) // never fails
	}
	if len(plain) == spanSize {
		return "", left
	}
	k := s.of(config)
	aead, isNew, err := s.cipher(k, s.salt)
	if err != nil {
		return "", left
	}
	if isNew {
		s.keep(k, s.salt, aead)
	}
	sealed := append([]byte{sealVersion}, s.salt[:]...)
	sealed = aead.Seal(sealed, nil, plain, k.place)
	return base64.RawURLEncoding.EncodeToString(sealed), left
}

// sealedSize returns the length of the text of so many bytes.
func sealedSize(plain int) int {
	const nonceAndTag = 12 + 16
	return base64.RawURLEncoding.EncodedLen(1 + saltSize + nonceAndTag + plain)
}

var errForged = errors.New("not sealed by this sidecar, or by one with its key_secret, domain and store")

// open returns what a text says: what is held, and the span of the check, which
// is not valid if there is none. The error is errForged.
func (s *sealer) open(config *policy.Config, text string) (all []held, check trace.SpanContext, err error) {
	plain, err := s.opened(config, text)
	if err != nil || len(plain) < spanSize {
		return nil, check, errForged
	}
	if id := trace.TraceID(plain[:16]); id.IsValid() {
		check = trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: id, SpanID: trace.SpanID(plain[16:spanSize]), TraceFlags: trace.FlagsSampled, Remote: true,
		})
	}
	for plain = plain[spanSize:]; len(plain) > 0; {
		if len(plain) < 2 {
			return nil, check, errForged
		}
		n := int(binary.BigEndian.Uint16(plain))
		if plain = plain[2:]; len(plain) < n+limiter.HoldBytes {
			return nil, check, errForged
		}
		prefix := config.KeyPrefix() + ":"
		h := held{key: prefix + string(plain[:n])}
		var ok bool
		if h.domain, h.limit, ok = limitOf(h.key[len(prefix):]); !ok {
			return nil, check, errForged
		}
		if err := h.hold.UnmarshalBinary(plain[n : n+limiter.HoldBytes]); err != nil {
			return nil, check, errForged
		}
		all, plain = append(all, h), plain[n+limiter.HoldBytes:]
	}
	return all, check, nil
}

// opened returns a text as it was before it was sealed.
func (s *sealer) opened(config *policy.Config, text string) ([]byte, error) {
	if len(text) > maxSealed {
		return nil, errForged
	}
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(sealed) < 1+saltSize || sealed[0] != sealVersion {
		return nil, errForged
	}
	salt := [saltSize]byte(sealed[1:])
	k := s.of(config)
	aead, isNew, err := s.cipher(k, salt)
	if err != nil {
		return nil, errForged
	}
	plain, err := aead.Open(nil, nil, sealed[1+saltSize:], k.place)
	if err != nil {
		return nil, errForged
	}
	if isNew {
		s.keep(k, salt, aead)
	}
	return plain, nil
}

// limitOf returns the domain and the name of the limit whose bucket has a key,
// which begins with the domain.
func limitOf(key string) (domain, limit string, ok bool) {
	domain, rest, ok := strings.Cut(key, ":")
	if !ok {
		return "", "", false
	}
	limit, _, ok = strings.Cut(rest, ":{")
	return domain, limit, ok
}
