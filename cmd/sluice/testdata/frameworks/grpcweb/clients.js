// Clients of grpc.health.v1.Health/Check by gRPC-Web. Each function makes a call
// to an address and returns the code of the status and its message, with a
// space between them.
import { GrpcWebClientBase, MethodDescriptor, MethodType } from 'grpc-web';
import { ConnectError } from '@connectrpc/connect';
import { createGrpcWebTransport } from '@connectrpc/connect-web';
import { EmptySchema } from '@bufbuild/protobuf/wkt';

// The messages are left encoded.
const check = new MethodDescriptor('/grpc.health.v1.Health/Check', MethodType.UNARY, Object, Object,
  () => new Uint8Array(), (bytes) => bytes);

// google calls with the package grpc-web, in the format binary or text.
export const google = (address, format) => new Promise((resolve) => {
  new GrpcWebClientBase({ format }).rpcCall(`http://${address}/grpc.health.v1.Health/Check`, {}, {}, check,
    (error) => resolve(error ? `${error.code} ${error.message}` : '0 '));
});

// connect calls with the package @connectrpc/connect-web.
export const connect = async (address) => {
  const method = {
    kind: 'rpc', methodKind: 'unary', name: 'Check', parent: { typeName: 'grpc.health.v1.Health' },
    input: EmptySchema, output: EmptySchema,
  };
  try {
    await createGrpcWebTransport({ baseUrl: `http://${address}` }).unary(method, undefined, undefined, undefined, {});
    return '0 ';
  } catch (e) {
    const error = ConnectError.from(e);
    return `${error.code} ${error.rawMessage}`;
  }
};
