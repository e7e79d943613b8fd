package accesslog

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Field says which field of a log is which attribute of a request.
type Field struct {
	Attribute string // such as request.headers["x-api-key"]
	Name      string // of the field, or its number from 1

	set   setter
	index int // -1: by name
}

// ParseField parses ATTRIBUTE=NAME. NAME is a member of JSON lines, where dots
// descend, a column of a CSV file, a field NAME=value of a line of text, or the
// number of a field of text or of a column, from 1. The last = separates.
func ParseField(s string) (Field, error) {
	at := strings.LastIndexByte(s, '=')
	if at <= 0 || at == len(s)-1 {
		return Field{}, fmt.Errorf(`%s: want ATTRIBUTE=NAME such as request.headers["x-api-key"]=api_key`, quote(s))
	}
	f := Field{Attribute: canonical(strings.TrimSpace(s[:at])), Name: strings.TrimSpace(s[at+1:]), index: -1}
	var err error
	if f.set, err = setterOf(f.Attribute); err != nil {
		return Field{}, fmt.Errorf("%s: %w", quote(s[:at]), err)
	}
	if n, err := strconv.Atoi(f.Name); err == nil {
		if n < 1 {
			return Field{}, errors.New("the first field is number 1")
		}
		f.index = n - 1
	}
	return f, nil
}

// canonical returns an attribute as policy names it: the entries of maps in
// brackets and double quotes.
func canonical(attribute string) string {
	path, err := splitAttribute(attribute)
	if err != nil {
		return attribute
	}
	of, entry := path[0]+"."+path[1], 2
	if path[0] == "context" {
		of, entry = "context", 1
	}
	switch of {
	case "request.headers", "request.params", "request.cookies", "response.headers", "response.trailers", "context",
		"metadata.filter_metadata":
	default:
		return attribute
	}
	if len(path) <= entry {
		return attribute
	}
	name := path[entry]
	if of == "request.headers" {
		name = strings.ToLower(name)
	}
	text := fmt.Sprintf("%s[%q]", of, name)
	return strings.Join(append([]string{text}, path[entry+1:]...), ".")
}
