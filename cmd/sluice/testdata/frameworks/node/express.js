// An Express application. Its argument is the package: express, or express4
// for the version before.
'use strict';

const name = process.argv[2];
const express = require(name);
const vhost = require('vhost');

const ran = (handler) => (_, response) => response.set('x-handler', handler).end();
const rest = name === 'express4' ? '/static/*' : '/static/*rest';

const api = express.Router();
api.get('/v1/orders/:id', ran('limited'));
api.get('/public/admin', ran('limited'));
api.use('/admin', ran('limited'));
api.get('/healthz', ran('exempt'));
api.get(['/static', rest], ran('exempt'));

const app = express();
for (const host of ['api.example.com', /^.+\.wild\.example\.com$/i, '[2001:db8::1]']) {
  app.use(vhost(host, api));
}
app.use(ran('other'));

const server = app.listen(0, '127.0.0.1', () => console.log(server.address().port));
