package policy

import (
	"os"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// readSecretFile reads the file that n names. A byte order mark at its
// beginning and line ends at its end, which editors add, are not part of the
// secret.
func (cr *configReader) readSecretFile(n node) (string, bool) {
	name, ok := cr.text(n)
	if !ok {
		return "", false
	}
	text, err := cr.inputs.read(cr.path(name), maxSecret)
	if err != nil {
		cr.wrongFile(n, err)
		return "", false
	}
	cr.warnOfReaders(n, cr.path(name))
	secret := strings.TrimRight(string(withoutBOM(text)), "\r\n")
	if secret == "" || len(text) > maxSecret {
		cr.wrong(n, "%s must contain a secret of 1 to %d bytes", displayText(n, cr.path(name)), maxSecret)
		return "", false
	}
	return secret, true
}

func (cr *configReader) readSecret(n node, read func(node) (string, bool)) {
	if cr.config.hasher.secret != nil {
		cr.wrong(n, "key_secret and key_secret_file are mutually exclusive")
		return
	}
	s, ok := read(n)
	if !ok {
		return
	}
	if s == "" {
		cr.wrong(n, "empty secret; give it a value or omit the field")
		return
	}
	if len(s) < shortSecret {
		cr.warn(n, "a secret of %d bytes can be guessed; use at least %d random bytes", len(s), shortSecret)
	}
	cr.config.hasher.secret = []byte(s)
}

// hideFromHash excludes from the config's hash a value that is a secret or
// contains one. The hash covers instead in its place.
func (cr *configReader) hideFromHash(n node, instead string) {
	t := n.GetToken()
	if l, ok := n.Node.(*ast.LiteralNode); ok {
		t = l.Value.GetToken()
	}
	if t != nil && t.Position != nil {
		cr.hidden[[2]int{t.Position.Line, t.Position.Column}] = instead
	}
}

// hashTokens adds the tokens of the config, except for hidden values, to the
// config's hash. With secrets in it, anyone who can read the hash could test
// guesses. It then drops the tokens, which are large.
func (cr *configReader) hashTokens() {
	var quoted []byte
	for _, t := range cr.tokens {
		value := t.Value
		if instead, ok := cr.hidden[[2]int{t.Position.Line, t.Position.Column}]; ok {
			value = instead
		}
		quoted = append(strconv.AppendQuote(quoted[:0], value), ' ')
		_, _ = cr.inputs.public.Write(quoted)
	}
	cr.tokens = nil
}

// shortSecret is the length in bytes below which a key_secret is too short.
const shortSecret = 16

// warnOfReaders warns of a file with a secret that every user of the machine
// can read.
func (cr *configReader) warnOfReaders(n node, file string) {
	if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o004 != 0 {
		cr.warn(n, "%s is readable by every user (mode %#o); use chmod o-r, or defaultMode: 0440 for a Secret volume",
			file, info.Mode().Perm())
	}
}
