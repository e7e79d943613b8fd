package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

var (
	fence     = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	codeSpan  = regexp.MustCompile("`[^`\n]*`")
	linkText  = regexp.MustCompile(`!?\[([^\]]*)\]\([^)]*\)`)
	link      = regexp.MustCompile(`\]\(\s*([^)\s]+)(?:\s+"[^"]*")?\s*\)`)
	reference = regexp.MustCompile(`(?m)^ {0,3}\[[^\]]+\]:\s+(\S+)`)
	heading   = regexp.MustCompile(`(?m)^#{1,6} +(.*?) *#*$`)
	notInSlug = regexp.MustCompile(`[^\p{L}\p{N}_ -]`)
)

// links returns the targets of the links in a Markdown text, except in code.
func links(text string) []string {
	text = codeSpan.ReplaceAllString(fence.ReplaceAllString(text, ""), "")
	var targets []string
	for _, pattern := range []*regexp.Regexp{link, reference} {
		for _, m := range pattern.FindAllStringSubmatch(text, -1) {
			targets = append(targets, m[1])
		}
	}
	return targets
}

// anchors returns the anchors that GitHub gives the headings of a Markdown
// text.
func anchors(text string) map[string]bool {
	all := make(map[string]bool)
	times := make(map[string]int)
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		title := linkText.ReplaceAllString(m[1], "$1")
		slug := strings.ReplaceAll(notInSlug.ReplaceAllString(strings.ToLower(title), ""), " ", "-")
		anchor := slug
		if n := times[slug]; n > 0 {
			anchor += "-" + strconv.Itoa(n)
		}
		times[slug]++
		all[anchor] = true
	}
	return all
}

// brokenLinks returns the relative links of a Markdown file that lead to no
// file below the root, or to no heading of a Markdown file there.
func brokenLinks(t *testing.T, root, name string) (broken []string) {
	t.Helper()
	read := func(name string) string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for _, target := range links(read(name)) {
		if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
			continue
		}
		path, anchor, hasAnchor := strings.Cut(target, "#")
		to := name
		if path != "" {
			to = filepath.Join(filepath.Dir(name), filepath.FromSlash(path))
		}
		if _, err := os.Stat(filepath.Join(root, to)); err != nil || !filepath.IsLocal(to) {
			broken = append(broken, target)
			continue
		}
		if hasAnchor && (filepath.Ext(to) != ".md" || !anchors(read(to))[anchor]) {
			broken = append(broken, target)
		}
	}
	return broken
}

// TestLinks checks that every relative link in a Markdown file of the
// repository leads to a file, and every anchor to a heading.
func TestLinks(t *testing.T) {
	root := filepath.Join("..", "..")
	files, targets := 0, 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "node_modules") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) != ".md" {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		targets += len(links(string(text)))
		for _, target := range brokenLinks(t, root, rel) {
			t.Errorf("%s: %s leads nowhere", rel, target)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 10 || targets < 50 {
		t.Errorf("only %d links of %d files were looked at", targets, files)
	}
}

func TestBrokenLinks(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"a.md": "# A `code` and [a link](sub/b.md)\n## Twice\n## Twice\n## What's *new*, in 1.0?\n" +
			"[1](#a-code-and-a-link) [2](#twice) [3](#twice-1) [4](#whats-new-in-10) [5](sub/b.md#there) [6](sub) " +
			"[7](https://example.com/x#y)\n" +
			"```\n# Not a heading\n[no link](nowhere)\n```\n`[none](nowhere)`\n" +
			"[8](#twice-2) [9](#not-a-heading) [10](nowhere.md) ![11](nowhere.svg) [12](sub/b.md#nowhere) [13](../a.md) " +
			"[14](sub#a)\n" +
			"[ref]: sub/nowhere.md\n",
		"sub/b.md": "# There\n[back](../a.md#twice)\n",
	} {
		path := filepath.Join(root, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := "#twice-2 #not-a-heading nowhere.md nowhere.svg sub/b.md#nowhere ../a.md sub#a sub/nowhere.md"
	if broken := strings.Join(brokenLinks(t, root, "a.md"), " "); broken != want {
		t.Errorf("broken are %s, want %s", broken, want)
	}
	if broken := brokenLinks(t, root, filepath.Join("sub", "b.md")); broken != nil {
		t.Errorf("broken are %v, want none", broken)
	}
}
