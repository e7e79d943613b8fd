package k8s

import (
	"math/rand/v2"
	"testing"

	"go.yaml.in/yaml/v3"
)

// A string is written as yaml.v3 writes a string, whether or not isSimple takes it
// for one that need not be encoded to know its style.
func TestStringNode(t *testing.T) {
	texts := []string{
		"", "y", "No", "oN", "off", "true", "null", "~", "<<", "=", "1:30", "-1:30", "+1:30.5", "1:75", "10m",
		"32Mi", "9001", "0777", "0o17", "0x1F", "1_000", "1e3", ".5", ".inf", "2026-01-01", "--config=/x", "- a",
		"-", "? a", "?", ": a", "a: b", "a #b", "#b", "*a", "&a", "!a", "%a", "@a", "`a", "|", ">", "'", `"`, "[a",
		"{a", ",", "---", "...", "--- a", " a", "a ", "é", "\t", "a\nb", "127.0.0.1:9001",
		"unix:///run/sluice.sock", "$(POD_NAME)", `\`, "a\\b",
	}
	const letters = "yYnNoOfFsSeE019:.,-+_=<>#&*!|%@`'\"[]{}?~ /\\\té"
	random := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		text := []rune{}
		for range 1 + random.IntN(5) {
			all := []rune(letters)
			text = append(text, all[random.IntN(len(all))])
		}
		texts = append(texts, string(text))
	}
	simple := 0
	for _, text := range texts {
		got, err := stringNode(text)
		if err != nil {
			t.Fatal(err)
		}
		if isSimple(text) {
			simple++
		}
		want := new(yaml.Node)
		if err := want.Encode(text); err != nil {
			t.Fatal(err)
		}
		if want.ShortTag() != "!!str" {
			continue // the merge key: see stringNode
		}
		for _, in := range []func(*yaml.Node) *yaml.Node{
			func(n *yaml.Node) *yaml.Node { return &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{n}} },
			func(n *yaml.Node) *yaml.Node {
				return &yaml.Node{Kind: yaml.MappingNode, Content: []*yaml.Node{n, {Kind: yaml.ScalarNode, Value: "v"}}}
			},
		} {
			a, errA := encodeYAML(in(got), true)
			b, errB := encodeYAML(in(want), true)
			if errA != nil || errB != nil || string(a) != string(b) {
				t.Fatalf("%q is written as\n%swant\n%s%v %v", text, a, b, errA, errB)
			}
		}
	}
	if simple < len(texts)/4 {
		t.Errorf("only %d of %d are simple: this says little", simple, len(texts))
	}
}
