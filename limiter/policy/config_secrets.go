package policy

import (
	"fmt"
	"os"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
)

// secretFile reads the file that a value names. A byte order mark at its
// beginning and line ends at its end, which editors add, are no part of the
// secret.
func (f *configFile) secretFile(n node) (string, bool) {
	name, ok := f.text(n)
	if !ok {
		return "", false
	}
	text, err := f.inputs.read(f.path(name), maxSecret)
	if err != nil {
		f.wrongFile(n, err)
		return "", false
	}
	f.warnOfReaders(n, f.path(name))
	secret := strings.TrimRight(string(withoutBOM(text)), "\r\n")
	if secret == "" || len(text) > maxSecret {
		f.wrong(n, "%s must contain a secret of 1 to %d bytes", shown(n, f.path(name)), maxSecret)
		return "", false
	}
	return secret, true
}

func (f *configFile) readSecret(n node, read func(node) (string, bool)) {
	if f.config.hasher.secret != nil {
		f.wrong(n, "key_secret and key_secret_file are mutually exclusive")
		return
	}
	s, ok := read(n)
	if !ok {
		return
	}
	if s == "" {
		f.wrong(n, "empty secret; give it a value or omit the field")
		return
	}
	if len(s) < shortSecret {
		f.warn(n, "a secret of %d bytes can be guessed; use at least %d random bytes", len(s), shortSecret)
	}
	f.config.hasher.secret = []byte(s)
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

// shortSecret is the length in bytes below which a key_secret is warned of.
const shortSecret = 16

// warnOfReaders warns of a secret's file that every user of the machine can read.
func (f *configFile) warnOfReaders(n node, file string) {
	if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o004 != 0 {
		f.warn(n, "%s is readable by every user (mode %#o); use chmod o-r, or defaultMode: 0440 for a Secret volume", file, info.Mode().Perm())
	}
}
