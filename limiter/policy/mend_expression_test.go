package policy

import "testing"

// TestMendsOfExpressions checks mistakes in expressions.
func TestMendsOfExpressions(t *testing.T) {
	checkMends(t, t.TempDir(), []mended{
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: x-api-key\n",
			`4:10: limits[0].key: "x-api-key" is not an expression; for the header write request.headers["x-api-key"]`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: request.headers.x-api-key\n",
			`4:10: limits[0].key: a header's name goes in brackets and quotes; write request.headers["x-api-key"]`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: request.headers[x-api-key]\n",
			`4:10: limits[0].key: a header's name goes in brackets and quotes; write request.headers["x-api-key"]`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: request.headers(\"x-api-key\")\n",
			`4:10: limits[0].key: a header's name goes in brackets and quotes; write request.headers["x-api-key"]`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: headers[\"x-api-key\"]\n",
			`4:10: limits[0].key: unknown name headers; write request.headers["x-name"]`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: request.headers[\"X-API-Key\"]\n",
			`4:25: limits[0].key: the header "X-API-Key" is not in lower case; write "x-api-key"`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: %REQ(x-api-key)%\n",
			`4:10: limits[0].key: Envoy's format strings are not expressions; write one such as request.headers["x-api-key"]`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: request.body\n",
			`4:17: limits[0].key: unknown name request.body; sluice reads no bodies; use request.size, a header, or settle, which knows the response`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: client.address\n",
			`4:10: limits[0].key: unknown name client.address; for the client's address write client.ip, or client.network, which takes an IPv6 /64 as one client`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: remote_address\n",
			`4:10: limits[0].key: unknown name remote_address; for the client's address write client.ip, or client.network, which takes an IPv6 /64 as one client`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: request.url\n",
			`4:17: limits[0].key: unknown name request.url; write request.path, or request.url_path without the query`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: method\n",
			`4:10: limits[0].key: unknown name method; write request.method`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: request.methods\n",
			`4:17: limits[0].key: unknown name request.methods; did you mean request.method?`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: claims.sub\n",
			`4:10: limits[0].key: unknown name claims.sub; for a claim write metadata.filter_metadata["envoy.filters.http.jwt_authn"].payload.NAME`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: request.method = \"GET\"\n",
			`4:26: limits[0].when: = is not an operator; write ==`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: request.method == \"GET\" and request.host == \"a\"\n",
			`4:35: limits[0].when: and is not an operator; write &&`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: not request.method == \"GET\"\n",
			`4:15: limits[0].when: not is not an operator; write !( )`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: request.method == \"GET\n",
			`4:29: limits[0].when: a string is not closed; add its quote, or quote the whole expression if the string has " #" in it, which begins a comment`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: (request.method == \"GET\"\n",
			`4:35: limits[0].when: a ( is not closed; add )`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: request.method == “GET”\n",
			`4:29: limits[0].when: typographic quotes; write " or '`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: $request.method\n",
			`4:10: limits[0].key: a name cannot begin with $; write an attribute without it, and an environment variable as ${NAME}`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: request.headers[\"x\"]\n",
			`4:11: limits[0].when: must be a boolean, not string; compare it, as in request.headers["x"] == "value"`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    cost: request.headers[\"x-cost\"]\n",
			`4:11: limits[0].cost: must be a number, not string; write int(request.headers["x-cost"])`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    when: request.size > \"100\"\n",
			`4:24: limits[0].when: > does not take (int, string); both sides must have the same type: write int(...) or string(...) around one`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: request.path.toLowerCase()\n",
			`4:34: limits[0].key: unknown function toLowerCase; write lowerAscii()`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: \"\"\n",
			`4:11: limits[0].key: empty expression; write one such as client.network, or omit the field`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: []\n",
			`4:10: limits[0].key: empty list; want 1 to 8 parts, or omit key for one shared bucket`,
		},
		{
			"limits:\n  - name: a\n    rate: 10/m\n    key: 5\n",
			`4:10: limits[0].key: must be an expression such as request.headers["x-api-key"], not a number`,
		},
	})
}
