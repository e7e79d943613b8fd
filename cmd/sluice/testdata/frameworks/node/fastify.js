// A Fastify application. With the argument lenient, its router takes every
// spelling of a path that Fastify can be told to take.
'use strict';

const lenient = process.argv[2] === 'lenient';
const fastify = require('fastify')({
  routerOptions: {
    caseSensitive: !lenient,
    ignoreDuplicateSlashes: lenient,
    ignoreTrailingSlash: lenient,
    useSemicolonDelimiter: lenient,
  },
});

const ran = (handler) => (_, reply) => reply.header('x-handler', handler).send();

for (const host of [/^api\.example\.com(:.*)?$/i, /^.+\.wild\.example\.com(:.*)?$/i, /^\[2001:db8::1\](:.*)?$/i]) {
  const get = (url, handler) => fastify.route({ method: 'GET', url, handler: ran(handler), constraints: { host } });
  get('/v1/orders/:id', 'limited');
  get('/public/admin', 'limited');
  get('/admin', 'limited');
  get('/admin/*', 'limited');
  get('/healthz', 'exempt');
  get('/static', 'exempt');
  get('/static/*', 'exempt');
}
fastify.get('*', ran('other'));

fastify.listen({ port: 0, host: '127.0.0.1' }).then(() => console.log(fastify.server.address().port));
