"""A Flask application. Its argument is the server: waitress, or werkzeug."""

import sys

from flask import Flask
from werkzeug.routing import BaseConverter


class Hosts(BaseConverter):
    """The hosts of the limited and exempt routes, with or without a port."""

    regex = r"(?:(?:api|.+\.wild)\.example\.com|\[2001:db8::1\])(?::.*)?"


class Everywhere(BaseConverter):
    """All hosts, after those above."""

    regex = r".*"
    weight = 1000


app = Flask(__name__, host_matching=True, static_folder=None)
app.url_map.converters.update(hosts=Hosts, everywhere=Everywhere)


def route(path, handler, host="<hosts:host>"):
    def ran(**_):
        return "", {"x-handler": handler}

    app.add_url_rule(path, f"{handler} {path}", ran, host=host)


route("/v1/orders/<id>", "limited")
route("/public/admin", "limited")
route("/admin", "limited")
route("/admin/", "limited")
route("/admin/<path:rest>", "limited")
route("/healthz", "exempt")
route("/static", "exempt")
route("/static/", "exempt")
route("/static/<path:rest>", "exempt")
route("/", "other", host="<everywhere:host>")
route("/<path:rest>", "other", host="<everywhere:host>")


if sys.argv[1] == "waitress":
    import waitress

    server = waitress.create_server(app, host="127.0.0.1", port=0, threads=4)
    print(server.effective_port, flush=True)
    server.run()
else:
    import logging

    from werkzeug.serving import WSGIRequestHandler, make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    WSGIRequestHandler.protocol_version = "HTTP/1.1"  # keeps connections alive
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(server.port, flush=True)
    server.serve_forever()
