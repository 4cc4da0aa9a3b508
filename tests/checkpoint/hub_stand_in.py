"""A local stand-in for the Hugging Face Hub, for the client of huggingface_hub (HF_ENDPOINT points here).

It implements the part of the protocol that downloads, checks for files and pushes models, keeps everything in memory,
and records every request.
"""
import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = 'c' * 40


class HubStandIn:
    """Repositories served on a free port of 127.0.0.1 while in a `with` block.

    Attributes:
        repos: {repository id: {file name: content}}, can be changed while serving.
        requests: 'METHOD /path' of each request, in order.
        endpoint: The URL for HF_ENDPOINT.
    """

    def __init__(self):
        self.repos = {}
        self.requests = []
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.hub = self
        self.server.daemon_threads = True
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.05))
        self.thread.start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    """Responses of the stand-in `self.server.hub`."""
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer_download()

    def do_GET(self):
        self.answer_download()

    def do_POST(self):
        self.server.hub.requests.append(f'POST {self.path}')
        body = self.read_body()
        parts = self.path.partition('?')[0].strip('/').split('/')
        if parts == ['api', 'repos', 'create']:
            name = '/'.join(filter(None, (json.loads(body).get('organization') or 'me', json.loads(body)['name'])))
            self.server.hub.repos.setdefault(name, {})
            self.answer_json(dict(url=f'{self.server.hub.endpoint}/{name}', name=name, id=name))
        elif parts == ['api', 'validate-yaml']:
            self.answer_json(dict(errors=[], warnings=[]))
        elif parts[:2] == ['api', 'models'] and parts[4] == 'preupload':
            files = [dict(path=file['path'], uploadMode='regular', shouldIgnore=False)
                     for file in json.loads(body)['files']]
            self.answer_json(dict(files=files))
        elif parts[:2] == ['api', 'models'] and parts[4] == 'commit':
            repo = self.server.hub.repos['/'.join(parts[2:4])]
            for item in map(json.loads, body.splitlines()):
                if item['key'] == 'file':
                    repo[item['value']['path']] = base64.b64decode(item['value']['content'])
            url = f'{self.server.hub.endpoint}/{"/".join(parts[2:4])}/commit/{COMMIT}'
            self.answer_json(dict(success=True, commitOid=COMMIT, commitUrl=url))
        else:
            self.answer_error(404, 'NotFound')

    def answer_download(self):
        self.server.hub.requests.append(f'{self.command} {self.path}')
        parts = self.path.partition('?')[0].strip('/').split('/')  # owner / name / resolve / revision / file
        repo = self.server.hub.repos.get('/'.join(parts[:2]))
        if len(parts) < 5 or parts[2] != 'resolve':
            self.answer_error(404, 'NotFound')
        elif repo is None:
            self.answer_error(401, 'RepoNotFound')  # as the Hub responds to anonymous users
        elif '/'.join(parts[4:]) not in repo:
            self.answer_error(404, 'EntryNotFound')
        else:
            content = repo['/'.join(parts[4:])]
            self.answer(200, content, {
                'ETag': f'"{hashlib.sha256(content).hexdigest()}"', 'Content-Type': 'application/octet-stream'})

    def read_body(self):
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode(), {'Content-Type': 'application/json'})

    def answer_error(self, status, code):
        self.answer(status, b'{}', {'X-Error-Code': code, 'X-Error-Message': code})

    def answer(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, 'X-Repo-Commit': COMMIT, 'Content-Length': str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)
