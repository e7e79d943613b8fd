package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"cel.dev/cel-go/common/ast"
)

// read is an attribute that an expression reads, or an entry of one that is a map.
type read struct {
	attribute, entry string // entry is empty for the whole attribute
}

// String returns what is read as the config writes it.
func (r read) String() string {
	if r.entry == "" {
		return r.attribute
	}
	return fmt.Sprintf("%s[%q]", r.attribute, r.entry)
}

// readsOf returns what an expression reads: attributes, and where constants select
// an entry of a map, that entry.
func readsOf(tree *ast.AST) (all []read) {
	within := make(map[int64]bool) // expressions whose entry has been named
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if within[e.ID()] {
			return
		}
		if found, ok := readAt(tree, e, within); ok {
			all = append(all, found)
		}
	}))
	return all
}

// readAt returns what an expression is, if that is an attribute or an entry of
// one. It adds the expressions that this is made of to within.
func readAt(tree *ast.AST, e ast.Expr, within map[int64]bool) (read, bool) {
	if r := tree.ReferenceMap()[e.ID()]; r != nil && r.Name != "" {
		within[e.ID()] = true
		for _, part := range partsOf(e) {
			ast.PreOrderVisit(part, ast.NewExprVisitor(func(e ast.Expr) { within[e.ID()] = true }))
		}
		return read{attribute: r.Name}, true
	}
	for of := range attributesWithEntries {
		if name, ok := nameIn(tree, e, of); ok {
			for _, part := range partsOf(e) {
				ast.PreOrderVisit(part, ast.NewExprVisitor(func(e ast.Expr) { within[e.ID()] = true }))
			}
			return read{of, name}, true
		}
	}
	return read{}, false
}

// attributesWithEntries are the attributes that are maps.
var attributesWithEntries = map[string]bool{
	"request.headers": true, requestParams: true, requestCookies: true, "context": true, filterMetadata: true,
	responseHeaders: true, responseTrailers: true,
}

// reads returns what a limit reads of a request, in ascending order. What it
// reads of the client is what client_ip says.
func (c *Config) reads(r *rule) []string {
	found := make(map[string]bool)
	client := false
	for _, e := range r.expressions() {
		for _, read := range e.reads {
			if strings.HasPrefix(read.attribute, "client.") {
				client = true
			} else {
				found[read.String()] = true
			}
		}
	}
	if r.settle != nil && r.settle.expression != nil {
		for _, read := range r.settle.expression.reads {
			found[read.String()] = true
		}
		found["request.duration"] = true // when the hold ends
		delete(found, "cost")
	}
	for name, isRead := range map[string]bool{
		"request.host": len(r.match.hosts) > 0, "request.method": len(r.match.methods) > 0,
		"request.path": len(r.match.paths) > 0, "source.principal": len(r.match.principals) > 0,
	} {
		if isRead {
			found[name] = true
		}
	}
	// Where a part of the key is absent, the client may take its place; that is
	// the reader's to see in Absent.
	if client || len(r.match.clients) > 0 {
		switch {
		case c.client.header != "":
			found[fmt.Sprintf("request.headers[%q]", c.client.header)] = true
		case c.client.xffFromRight > 0:
			found[`request.headers["x-forwarded-for"]`] = true
		default:
			found["source.address"] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}
