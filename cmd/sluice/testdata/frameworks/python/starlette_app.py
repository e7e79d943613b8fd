"""A Starlette application on uvicorn. Its argument is the HTTP parser: h11, or httptools."""

import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Host, Route, Router


def ran(handler):
    async def endpoint(_):
        return Response(headers={"x-handler": handler})

    return endpoint


async def other(scope, receive, send):
    await Response(headers={"x-handler": "other"})(scope, receive, send)


api = Router(
    [
        Route("/v1/orders/{id}", ran("limited")),
        Route("/public/admin", ran("limited")),
        Route("/admin", ran("limited")),
        Route("/admin/{rest:path}", ran("limited")),
        Route("/healthz", ran("exempt")),
        Route("/static", ran("exempt")),
        Route("/static/{rest:path}", ran("exempt")),
    ],
    default=other,
)
app = Starlette(routes=[Host("api.example.com", api), Host("{name}.wild.example.com", api)])
app.router.default = other

listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, http=sys.argv[1], access_log=False, log_level="warning")).run(sockets=[listener])
