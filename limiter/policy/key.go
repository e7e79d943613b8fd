package policy

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"strconv"
)

// The tags of a key's parts. A part is its tag, the length of its text in bytes, a dot and the text, so that no two lists of parts
// make the same key, and nothing that a client sends equals what stands for something else.
const (
	tagOpen   = '=' // the value, escaped
	tagHash   = '#' // the value's hash
	tagAbsent = '~' // what stands in for an absent value
)

// noKey stands in the place of the parts where a limit has no key. The braces are never empty: a Redis Cluster would not take them for a
// hash tag.
const noKey = "-"

// longestOpen bounds what stands in a key as it is; what is longer is hashed.
const longestOpen = 200

// appendOpen appends a part that may be read by people. A path's query may hold secrets, so what has one is hashed.
func (h *hasher) appendOpen(key []byte, value string) []byte {
	length, query := 0, false
	for i := 0; i < len(value); i++ {
		if length++; !isPlain[value[i]] {
			length += 2
		}
		query = query || value[i] == '?'
	}
	if query || length > longestOpen {
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

// appendAbsent appends what stands in for an absent value: the client's network, or nothing.
func (h *hasher) appendAbsent(key []byte, standIn string) []byte {
	at := len(key)
	key = h.appendOpen(key, standIn) // an address, which is short
	key[at] = tagAbsent
	return key
}

// isPlain says which bytes stand for themselves: those of an RFC 3986 path, but for %.
var isPlain = func() (plain [256]bool) {
	for _, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/:@!$&'()*+,=" {
		plain[c] = true
	}
	return plain
}()

// hasher hides values that may be secrets.
type hasher struct {
	secret []byte // empty: SHA-256 alone
}

// appendHash appends a part of which nothing can be read: the value's SHA-256 or, with a secret, its HMAC-SHA-256.
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
