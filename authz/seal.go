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

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// What a request holds travels to its end in a text that Envoy keeps: the check
// writes it into the dynamic metadata, and the access log brings it back. The
// text is encrypted, since it has the keys of buckets, and authenticated: only
// who has the key could return tokens to a bucket.

// maxSealed is the maximum length of a sealed text in bytes.
const maxSealed = 4096

// sealVersion is the first byte of every sealed text.
const sealVersion = 1

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

	mu sync.Mutex
	// ciphers has the ciphers by secret and salt.
	ciphers map[cipherID]cipher.AEAD
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

// cipher returns the cipher for a config and a salt.
func (s *sealer) cipher(config *policy.Config, salt [saltSize]byte) (cipher.AEAD, cipherID, error) {
	secret := config.SettleSecret()
	if secret == nil {
		secret = s.own[:]
	}
	id := cipherID{sha256.Sum256(secret), salt}
	s.mu.Lock()
	c, ok := s.ciphers[id]
	s.mu.Unlock()
	if ok {
		return c, id, nil
	}
	key, err := hkdf.Key(sha256.New, secret, salt[:], "sluice settle", 32)
	if err != nil {
		return nil, id, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, id, err
	}
	c, err = cipher.NewGCMWithRandomNonce(block)
	return c, id, err
}

// keep keeps a cipher that has sealed or opened a text: not those of forged
// texts, of which there may be any number.
func (s *sealer) keep(id cipherID, c cipher.AEAD) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ciphers) >= maxCiphers {
		clear(s.ciphers)
	}
	s.ciphers[id] = c
}

// place is what a text is good for: a domain, a store and a prefix.
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

// seal returns the sealed text of what a request holds. It leaves out what does
// not fit, and returns how many that are. The text is empty if nothing is held.
func (s *sealer) seal(config *policy.Config, d *limiter.Decision) (text string, left int) {
	var plain []byte
	prefix := config.KeyPrefix() + ":"
	for i := range d.Charges {
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
	if len(plain) == 0 {
		return "", left
	}
	aead, id, err := s.cipher(config, s.salt)
	if err != nil {
		return "", left
	}
	s.keep(id, aead)
	sealed := append([]byte{sealVersion}, s.salt[:]...)
	sealed = aead.Seal(sealed, nil, plain, place(config))
	return base64.RawURLEncoding.EncodeToString(sealed), left
}

// sealedSize returns the length of the text of so many bytes.
func sealedSize(plain int) int {
	const nonceAndTag = 12 + 16
	return base64.RawURLEncoding.EncodedLen(1 + saltSize + nonceAndTag + plain)
}

var errForged = errors.New("not sealed by this sidecar, or by one with its key_secret, domain and store")

// open returns what a text says. Its error is errForged.
func (s *sealer) open(config *policy.Config, text string) ([]held, error) {
	if len(text) > maxSealed {
		return nil, errForged
	}
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(sealed) < 1+saltSize || sealed[0] != sealVersion {
		return nil, errForged
	}
	salt := [saltSize]byte(sealed[1:])
	aead, id, err := s.cipher(config, salt)
	if err != nil {
		return nil, errForged
	}
	plain, err := aead.Open(nil, nil, sealed[1+saltSize:], place(config))
	if err != nil {
		return nil, errForged
	}
	s.keep(id, aead)
	var all []held
	for len(plain) > 0 {
		if len(plain) < 2 {
			return nil, errForged
		}
		n := int(binary.BigEndian.Uint16(plain))
		if plain = plain[2:]; len(plain) < n+limiter.HoldBytes {
			return nil, errForged
		}
		h := held{key: config.KeyPrefix() + ":" + string(plain[:n])}
		var ok bool
		if h.domain, h.limit, ok = limitOf(string(plain[:n])); !ok {
			return nil, errForged
		}
		if err := h.hold.UnmarshalBinary(plain[n : n+limiter.HoldBytes]); err != nil {
			return nil, errForged
		}
		all, plain = append(all, h), plain[n+limiter.HoldBytes:]
	}
	return all, nil
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
