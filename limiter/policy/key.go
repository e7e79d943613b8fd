package policy

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"strconv"
	"strings"
)

// Tags of the parts of a key. A part is its tag, the length of its text in
// bytes, a dot and the text. So different lists of parts never make the same
// key, and nothing that a client sends can imitate a part with another tag.
const (
	tagOpen   = '=' // the value, escaped
	tagHash   = '#' // hash of the value
	tagAbsent = '~' // replacement of an absent value
)

// noKey replaces the parts of a limit without a key. The braces must not be
// empty, or Redis Cluster would not take them for a hash tag.
const noKey = "-"

// longestOpen is the maximum length of a plain-text part in bytes, after
// escaping. Longer values are hashed.
const longestOpen = 200

// appendOpen appends a value in plain text. It hashes a value that is long, or
// that has a query, which may contain secrets.
func (h *hasher) appendOpen(key []byte, value string) []byte {
	if strings.IndexByte(value, '?') >= 0 {
		return h.appendHash(key, value)
	}
	return h.appendReadable(key, value)
}

// appendReadable appends a value in plain text, and hashes one that is long.
func (h *hasher) appendReadable(key []byte, value string) []byte {
	length := 0
	for i := 0; i < len(value); i++ {
		if length++; !isPlain[value[i]] {
			length += 2
		}
	}
	if length > longestOpen {
		return h.appendHash(key, value)
	}
	key = append(key, tagOpen)
	key = append(strconv.AppendInt(key, int64(length), 10), '.')
	for i := 0; i < len(value); i++ {
		if c := value[i]; isPlain[c] {
			key = append(key, c)
		} else {
			key = append(key, '%', "0123456789ABCDEF"[c>>4], "0123456789ABCDEF"[c&15])
		}
	}
	return key
}

// appendAbsent appends the replacement of an absent value: the client's
// network, or nothing.
func (h *hasher) appendAbsent(key []byte, standIn string) []byte {
	at := len(key)
	key = h.appendOpen(key, standIn) // an address is short, so it is never hashed
	key[at] = tagAbsent
	return key
}

// isPlain has the bytes that are not escaped: those of a path in RFC 3986,
// except for %.
var isPlain = func() (plain [256]bool) {
	for _, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/:@!$&'()*+,=" {
		plain[c] = true
	}
	return plain
}()

// hasher hashes values that may be secrets.
type hasher struct {
	secret []byte // empty: SHA-256 instead of HMAC-SHA-256
}

// appendHash appends a hash of a value: its SHA-256 or, with a secret, its
// HMAC-SHA-256.
func (h *hasher) appendHash(key []byte, value string) []byte {
	var sum [sha256.Size]byte
	if len(h.secret) == 0 {
		sum = sha256.Sum256([]byte(value))
	} else {
		mac := hmac.New(sha256.New, h.secret)
		mac.Write([]byte(value))
		mac.Sum(sum[:0])
	}
	key = append(key, tagHash, '4', '3', '.')
	return base64.RawURLEncoding.AppendEncode(key, sum[:])
}
