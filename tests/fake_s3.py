"""As much of S3 as pyarrow asks for when it lists and reads: files of a dict, by name."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@contextmanager
def fake_s3(bucket: str, files: dict[str, bytes]) -> Iterator[str]:
    """Yields the options of a URI that lead to the server: `s3://bucket/a.jsonl?` + these."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            name = url.path.removeprefix(f"/{bucket}").lstrip("/")
            if name in files:
                data, ranged = files[name], re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if ranged:
                    start, stop = int(ranged[1]), min(int(ranged[2] or len(data)), len(data) - 1) + 1
                    return self.answer(206, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}")
                return self.answer(200, data)
            if not name and url.query:
                return self.answer(200, self.listing(parse_qs(url.query)))
            return self.answer(200 if not name else 404, b"")

        do_HEAD = do_GET

        def listing(self, query: dict[str, list[str]]) -> bytes:
            prefix = query.get("prefix", [""])[0]
            found = "".join(
                f"<Contents><Key>{name}</Key><Size>{len(data)}</Size><LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
                for name, data in sorted(files.items())
                if name.startswith(prefix)
            )
            return f'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>'.encode()

        def answer(self, status: int, body: bytes, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.send_header("ETag", '"1"')
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
