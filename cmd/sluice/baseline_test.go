package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"runtime/debug"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/redis/go-redis/v9"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"
)

// serveBaseline serves a server that sluice is compared with, on a port that it
// prints. If tuned is true it has the garbage collector and the workers of
// sluice; else gRPC and Go have their defaults.
func serveBaseline(server authv3.AuthorizationServer, tuned bool) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	var options []grpc.ServerOption
	if tuned {
		debug.SetGCPercent(200)
		options = append(options, grpc.NumStreamWorkers(8))
	}
	s := grpc.NewServer(options...)
	authv3.RegisterAuthorizationServer(s, server)
	fmt.Println(l.Addr())
	_ = s.Serve(l)
}

// constantServer is the least that a gRPC server must do to send the answer of
// sluice: it decides nothing.
func constantServer(tuned bool) { serveBaseline(constant{}, tuned) }

// plainServer is a simple sidecar: generated code, and one EVALSHA of the
// script of sluice for each check.
func plainServer(url string) {
	options, err := redis.ParseURL(url)
	if err != nil {
		panic(err)
	}
	options.PoolSize = 32
	p := plainSidecar{client: redis.NewClient(options), script: redis.NewScript(os.Getenv("SLUICE_TEST_SCRIPT"))}
	if err := p.script.Load(context.Background(), p.client).Err(); err != nil {
		panic(err)
	}
	serveBaseline(p, true)
}

type plainSidecar struct {
	client *redis.Client
	script *redis.Script
}

// oneCharge returns the script's argument for one token from a bucket of 1e9
// that refills at 1e9/s.
func oneCharge() string {
	b := []byte{4}                                                          // the last of its request
	b = append(b, binary.BigEndian.AppendUint64(nil, 1_000_000_000)[1:]...) // n tokens
	b = append(b, binary.BigEndian.AppendUint64(nil, 1_000_000)[2:]...)     // each p microseconds
	b = binary.BigEndian.AppendUint32(b, 1_000_000_000)
	return string(binary.BigEndian.AppendUint32(b, 1))
}

// tookOne reports whether the script's reply to oneCharge says that the token was
// taken.
func tookOne(reply string) bool { return len(reply) == 7+15 && reply[7] == 1+2 }

func (p plainSidecar) Check(ctx context.Context, check *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	ip := check.GetAttributes().GetSource().GetAddress().GetSocketAddress().GetAddress()
	reply, err := p.script.EvalSha(ctx, p.client, []string{"sluice:plain:per-client:{" + ip + "}"}, oneCharge()).Text()
	if err != nil {
		return nil, err
	}
	if !tookOne(reply) {
		return nil, fmt.Errorf("the script said %q", reply)
	}
	return constant{}.Check(ctx, check)
}

type constant struct{}

func (constant) Check(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	header := func(k, v string) *corev3.HeaderValueOption {
		return &corev3.HeaderValueOption{
			Header:       &corev3.HeaderValue{Key: k, Value: v},
			AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		}
	}
	return &authv3.CheckResponse{
		Status: &status.Status{},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{
			ResponseHeadersToAdd: []*corev3.HeaderValueOption{
				header(
					"x-ratelimit-limit",
					"1000000000",
				), header("x-ratelimit-remaining", "999999999"), header("x-ratelimit-reset", "1"),
			},
		}},
		DynamicMetadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			"decision": structpb.NewStringValue("allowed"), "limit": structpb.NewStringValue("per-client"),
			"key":       structpb.NewStringValue("=10.10.1.3.249"),
			"remaining": structpb.NewNumberValue(999999999), "cost": structpb.NewNumberValue(1),
			"source": structpb.NewStringValue("redis"), "shadow": structpb.NewListValue(&structpb.ListValue{}),
		}},
	}, nil
}
