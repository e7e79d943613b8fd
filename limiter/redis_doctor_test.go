package limiter

import "testing"

// TestProductOf checks that a server is called by its own name. The texts are
// what the servers print.
func TestProductOf(t *testing.T) {
	for info, want := range map[string]string{
		"# Server\r\nredis_version:8.0.2\r\nexecutable:/usr/bin/redis-server\r\n":                              "Redis 8.0.2",
		"# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:9.0.0\r\n":                    "Valkey 9.0.0",
		"# Server\r\nredis_version:7.2.4\r\nredict_version:7.3.6\r\n":                                          "Redict 7.3.6",
		"# Server\r\nredis_version:6.3.4\r\nexecutable:/usr/local/bin/keydb-server\r\n":                        "KeyDB 6.3.4",
		"# Server\r\nredis_version:255.255.255\r\nexecutable:/usr/bin/redis-server\r\n# KeyDB\r\nmvcc_depth:0": "KeyDB 255.255.255",
		"# Server\r\nredis_version:7.4.0\r\ndragonfly_version:df-v1.36.0\r\n":                                  "Dragonfly df-v1.36.0",
	} {
		if name, version := productOf(info); name+" "+version != want {
			t.Errorf("%q is %s %s, want %s", info, name, version, want)
		}
	}
}
