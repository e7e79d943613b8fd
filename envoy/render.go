package envoy

import (
	"embed"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"text/template/parse"
)

// The files are templates in the language of text/template, parsed by its
// parser. They use fields, if, template and part. text/template itself calls
// methods by name, so with it the linker keeps every exported method of the
// program: a third of its size, and 5 MiB of the memory of each sidecar
// (TestProgramIsSmall).

//go:embed templates/*.tmpl
var files embed.FS

var templates = func() map[string]*parse.Tree {
	all := map[string]*parse.Tree{}
	names, err := files.ReadDir("templates")
	if err != nil {
		panic(err)
	}
	for _, name := range names {
		text, err := files.ReadFile("templates/" + name.Name())
		if err != nil {
			panic(err)
		}
		trees, err := parse.Parse(name.Name(), string(text), "", "", map[string]any{"part": true})
		if err != nil {
			panic(err)
		}
		maps.Copy(all, trees)
	}
	return all
}()

// fields has the values that a template can write, by their names without the
// first dot. An empty value is false.
type fields map[string]string

// fields returns the fields that all templates have.
func (o Options) fields() fields {
	f := fields{"Limit": "", "Limits": "", "Metadata": "", "Waypoint": "", "TLS": "", "TLSName": "", "ClientCert": "",
		"FilterRetries": "", "Settle": "", "SettleHeaders": "", "SettleTrailers": "", "SettleReads": "", "Cluster": "sluice"}
	if o.Envoy != (Release{}) && o.Envoy.before(clusterRetries) {
		f["FilterRetries"] = "true"
	}
	if some := o.Limits[:min(len(o.Limits), 8)]; len(some) > 0 { // enough for an example
		f["Limit"], f["Limits"] = some[0], strings.Join(some, ",")
	}
	if o.Metadata {
		f["Metadata"] = "true"
	}
	if o.Settle != nil {
		f["Settle"] = "true"
		f["SettleHeaders"], f["SettleTrailers"] = quoted(o.Settle.Headers), quoted(o.Settle.Trailers)
		f["SettleReads"] = f["SettleHeaders"] + f["SettleTrailers"]
	}
	if o.TLS != nil {
		f["TLS"] = "true"
		if o.TLS.Name != "" {
			f["TLSName"] = strconv.Quote(strings.Replace(o.TLS.Name, "*", "sluice-gateway", 1))
		}
		if o.TLS.ClientCert {
			f["ClientCert"] = "true"
		}
	}
	return f
}

// quoted returns names as the elements of a list in YAML.
func quoted(names []string) string {
	all := make([]string, len(names))
	for i, name := range names {
		all[i] = strconv.Quote(name)
	}
	return strings.Join(all, ", ")
}

// put sets the fields of an endpoint.
func (f fields) put(name string, e *endpoint) {
	f[name+".Host"], f[name+".Path"], f[name+".Unix"], f[name+".Port"], f[name+".Name"] = e.Host, e.Path, e.Unix, "", ""
	if e.Host != "" {
		f[name+".Port"] = strconv.Itoa(e.Port)
	}
	if e.Name {
		f[name+".Name"] = "true"
	}
}

// execute returns a template with its fields filled in. It panics if the
// template uses anything unsupported; tests execute all templates.
func (f fields) execute(name string) []byte {
	var b strings.Builder
	f.write(&b, templates[name].Root)
	return []byte(b.String())
}

// write writes a node of a template.
func (f fields) write(b *strings.Builder, node parse.Node) {
	switch n := node.(type) {
	case *parse.ListNode:
		for _, each := range n.Nodes {
			f.write(b, each)
		}
	case *parse.TextNode:
		b.Write(n.Text)
	case *parse.IfNode:
		if f.value(n.Pipe) != "" {
			f.write(b, n.List)
		} else if n.ElseList != nil {
			f.write(b, n.ElseList)
		}
	case *parse.TemplateNode:
		f.write(b, templates[n.Name].Root)
	case *parse.ActionNode:
		b.WriteString(f.value(n.Pipe))
	default:
		panic(fmt.Sprintf("%s: unsupported in these templates", node))
	}
}

// value returns the value of a field or of `part "NAME" N`: the template NAME
// with each line indented by N spaces.
func (f fields) value(pipe *parse.PipeNode) string {
	args := pipe.Cmds[0].Args
	switch first := args[0].(type) {
	case *parse.FieldNode:
		if v, ok := f[strings.Join(first.Ident, ".")]; ok && len(pipe.Cmds) == 1 && len(args) == 1 {
			return v
		}
	case *parse.IdentifierNode: // the parser knows part only
		if len(pipe.Cmds) != 1 || len(args) != 3 {
			break
		}
		name, isText := args[1].(*parse.StringNode)
		indent, isNumber := args[2].(*parse.NumberNode)
		if isText && isNumber {
			margin := strings.Repeat(" ", int(indent.Int64))
			return margin + strings.ReplaceAll(string(f.execute(name.Text)), "\n", "\n"+margin)
		}
	}
	panic(fmt.Sprintf("%s: unsupported in these templates", pipe))
}
