package main

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestExplainMediaType checks that a body of another media type is rejected.
// Otherwise its fields would be ignored, and GET / explained.
func TestExplainMediaType(t *testing.T) {
	p := startSluice(t, "--config", file(t, "sluice.yaml", "limits: [{name: a, match: {paths: [/a]}, rate: 1/s}]"))
	for media, want := range map[string]int{
		"application/x-www-form-urlencoded": http.StatusOK, "application/x-www-form-urlencoded; charset=utf-8": http.StatusOK,
		"application/json": http.StatusUnsupportedMediaType, "": http.StatusUnsupportedMediaType,
		"multipart/form-data; boundary=x": http.StatusUnsupportedMediaType,
	} {
		r, err := http.NewRequestWithContext(
			t.Context(), http.MethodPost, "http://"+p.admin+"/api/explain", strings.NewReader("path=/a"),
		)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", media)
		answer, err := client(t).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(answer.Body)
		_ = answer.Body.Close()
		if answer.StatusCode != want || want == http.StatusOK && !strings.Contains(string(text), `"applies":true`) {
			t.Errorf("%q: %d %s", media, answer.StatusCode, text)
		}
	}
	if r, body := fetch(t, client(t), "http://"+p.admin+"/api/explain?path=/a"); r.StatusCode != http.StatusOK ||
		!strings.Contains(body, `"applies":true`) {
		t.Errorf("%d %s", r.StatusCode, body)
	}
}
