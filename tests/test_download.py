"""Downloads, from a local server that misbehaves on demand."""
import gzip
import hashlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from requests.exceptions import SSLError

from config import UserError
from prepare import download as module
from prepare.download import cache_folder, download, is_setting

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves server.files with server.headers. The next of server.faults, if any, is how this request goes wrong: a
    status, 'cut' halfway, 'plain': cut, and without Content-Range, and others."""
    def do_GET(self):
        server, name = self.server, self.path.lstrip('/')
        server.ranges.append(self.headers['Range'])
        fault = server.faults.pop(0) if server.faults else None
        if name.startswith('linked/'):  # as the Hub does: the hash stands in the redirection
            return self.head(302, {'Location': f'/{name[7:]}', 'X-Linked-Etag': f'"{server.etag}"'})
        if name.startswith('elsewhere/'):
            return self.head(302, {'Location': f'http://{name[10:]}'})
        if isinstance(fault, int) or name not in server.files:
            return self.head(fault or 404, {})
        content, start = server.files[name], 0
        if server.knows_ranges:
            start = int(re.fullmatch(r'bytes=(\d+)-', self.headers['Range'])[1])
            if start >= len(content):
                return self.head(416, {'Content-Range': f'bytes */{len(content)}'})
        if fault == 'beside':  # another process writes to the part
            with open(server.cache / 'file.bin.part', 'ab') as file:
                file.write(content[start:start + 100])
        if fault == 'changed' and self.headers['If-Unmodified-Since']:
            return self.head(412, {})
        if fault == 'no length':
            self.head(200, {'Content-Length': ''} | server.headers)
            return self.wfile.write(content[:1000])
        start = 0 if fault == 'whole' else start
        body = content[start:]
        total = {'Content-Range': f'bytes {start}-{len(content) - 1}/{len(content)}'} if server.knows_ranges and fault != 'plain' else {}
        length = {'Content-Length': '' if fault == 'short' else len(body)}
        self.head(206 if total else 200, total | length | server.headers)
        body = body[:-1] if fault == 'short' else body
        self.wfile.write(body[:len(body) // 2] if fault in ('cut', 'plain') else body)

    def head(self, status, headers):
        self.send_response(status)
        for name, value in ({'Content-Length': 0} | headers).items():
            if value != '':
                self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The server, its address as .url, and an empty cache folder as .cache."""
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    httpd.files, httpd.faults, httpd.ranges, httpd.etag, httpd.knows_ranges = {'file.bin': CONTENT}, [], [], SHA256, True
    httpd.url, httpd.cache = f'http://127.0.0.1:{httpd.server_port}/', tmp_path / 'cache'
    httpd.headers = {}
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv('NANO_CACHE', str(httpd.cache))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(module, 'PAUSES', (0, 0, 0))
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def leave_part(server, content):
    server.cache.mkdir()
    (server.cache / 'file.bin.part').write_bytes(content)


@pytest.mark.parametrize('digest', ['', SHA256, SHA256.upper(), MD5])
def test_fetched_once(server, digest):
    for _ in range(2):
        path = download(server.url + 'file.bin', 'folder/file.bin', digest)
        assert path == server.cache / 'folder/file.bin' and path.read_bytes() == CONTENT
    assert server.ranges == ['bytes=0-'] and {one.name for one in path.parent.iterdir()} == {'file.bin', 'file.bin.lock'}


def test_goes_on_where_it_stopped(server):
    leave_part(server, CONTENT[:1000])
    assert download(server.url + 'file.bin', 'file.bin', SHA256).read_bytes() == CONTENT
    assert server.ranges == ['bytes=1000-']


def test_cut_stream(server):
    server.faults = ['cut', 'cut']
    assert download(server.url + 'file.bin', 'file.bin').read_bytes() == CONTENT
    assert server.ranges == ['bytes=0-', f'bytes={len(CONTENT) // 2}-', f'bytes={len(CONTENT) * 3 // 4}-']


def test_the_first_answer_lacks_the_range(server):
    server.faults, server.headers = ['plain'], {'ETag': '"x"'}
    assert download(server.url + 'file.bin', 'file.bin').read_bytes() == CONTENT
    assert server.ranges == ['bytes=0-', f'bytes={len(CONTENT) // 2}-']


def test_a_size_that_only_an_earlier_answer_names(server):
    """The next one has no ranges, no length, and is cut."""
    server.faults, server.headers = ['cut', 'no length'], {'ETag': '"x"'}
    assert download(server.url + 'file.bin', 'file.bin').read_bytes() == CONTENT and len(server.ranges) == 3


@pytest.mark.parametrize('faults, headers, message', [
    ([202], {}, 'answers 202 in place of the file'), ([], {'Content-Encoding': 'gzip'}, 'sends it compressed')])
def test_another_answer_than_the_file(server, faults, headers, message):
    server.faults, server.headers = faults, headers
    with pytest.raises(UserError, match=message):
        download(server.url + 'file.bin', 'file.bin')
    assert not (server.cache / 'file.bin').exists()


def test_server_without_ranges_starts_anew(server):
    server.knows_ranges, server.faults = False, ['cut']
    leave_part(server, CONTENT[:1000])
    assert download(server.url + 'file.bin', 'file.bin').read_bytes() == CONTENT


@pytest.mark.parametrize('part', [CONTENT, CONTENT + b'too long'])
def test_complete_or_too_long_part(server, part):
    leave_part(server, part)
    assert download(server.url + 'file.bin', 'file.bin', SHA256).read_bytes() == CONTENT
    assert len(server.ranges) == (1 if part == CONTENT else 2)


@pytest.mark.parametrize('content, message', [
    (b'', 'an empty file'), (b'\n <!DOCTYPE html><html>Login', 'a web page instead of the file'),
    (b'<html>', 'a web page'), (b'version https://git-lfs.github.com/spec/v1\noid', 'a pointer of Git LFS'),
    (b'<?xml version="1.0"?>\n<!-- Login -->\n<!DOCTYPE html PUBLIC', 'a web page')])
def test_no_file(server, content, message):
    """Nothing, or the page of a network as text/plain: not kept, with and without ranges; and not used if copied."""
    for server.knows_ranges in (True, False):
        server.files['file.bin'] = content
        with pytest.raises(UserError, match=f'file.bin: {message}'):
            download(server.url + 'file.bin', 'file.bin')
        assert [path.name for path in server.cache.iterdir()] == ['file.bin.lock']
    (server.cache / 'file.bin').write_bytes(content)
    with pytest.raises(UserError, match=f'cache/file.bin: {message}.*; delete it and run this again'):
        download(server.url + 'file.bin', 'file.bin')


@pytest.mark.parametrize('fault', ['whole', 'short', 'changed', 204])
def test_another_part_than_asked_for(server, fault):
    """From its first byte, cut without a length, of a newer file: the file is complete in the end. 204 is nothing."""
    leave_part(server, CONTENT[:1000])
    server.faults = [fault]
    if fault == 204:
        server.cache.joinpath('file.bin.part').unlink()
        with pytest.raises(UserError, match='an empty file'):
            download(server.url + 'file.bin', 'file.bin')
    else:
        assert download(server.url + 'file.bin', 'file.bin').read_bytes() == CONTENT and len(server.ranges) == 2


@pytest.mark.parametrize('content, etags', [
    (CONTENT[::-1], ['"1"', '"2"']), (CONTENT[::-1] + b'longer', ['', '']),
    (CONTENT[::-1][:len(CONTENT) * 15 // 16], ['', ''])])
def test_a_part_of_another_version(server, content, etags):
    """The server ignores If-Unmodified-Since; the last content is as long as the part is by then."""
    server.faults, server.headers = ['cut'] * 4, {'ETag': etags[0]}
    with pytest.raises(UserError, match='run this again to resume it'):
        download(server.url + 'file.bin', 'file.bin')
    server.files['file.bin'], server.headers = content, {'ETag': etags[1]}
    assert download(server.url + 'file.bin', 'file.bin').read_bytes() == content and len(server.ranges) == 6
    assert {path.name for path in server.cache.iterdir()} == {'file.bin', 'file.bin.lock'}


@pytest.mark.parametrize('faults', [[], ['cut']])
def test_an_archive_is_stored_as_it_is_sent(server, faults):
    """Some servers name the packing of a .gz file as the encoding of the transfer."""
    content = gzip.compress(CONTENT)
    server.files['file.gz'], server.headers, server.faults = content, {'Content-Encoding': 'gzip'}, faults
    assert download(server.url + 'file.gz', 'file.gz').read_bytes() == content


@pytest.mark.parametrize('length', [f'{len(CONTENT)}, {len(CONTENT)}', 'unknown'])
def test_a_length_that_is_no_number(server, length):
    server.headers = {'Content-Length': length}
    assert download(server.url + 'file.bin', 'file.bin').read_bytes() == CONTENT


def test_a_setting_that_no_attempt_mends(server, monkeypatch):
    """A proxy of a kind that is not installed, a file of certificates that is missing: its reason, at once."""
    paused = []
    monkeypatch.setattr(module.time, 'sleep', paused.append)
    with pytest.raises(UserError, match=r'cannot be downloaded \(InvalidSchema: No connection adapters'):
        download('socks://127.0.0.1/file.bin', 'file.bin')
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', '/nonexistent.pem')
    with pytest.raises(UserError, match='cannot be downloaded .*invalid path: /nonexistent.pem'):
        download('https://127.0.0.1:9/file.bin', 'file.bin')
    with pytest.raises(UserError, match=r'cannot be downloaded \(LocationParseError: .*; correct the address, proxy or cert.* copy the'):
        download(server.url + 'elsewhere/a..b/file.bin', 'file.bin')
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
    with pytest.raises(UserError, match=r'cannot be downloaded \(ProxyError: .*Unable to connect to proxy.*; correct the address, proxy'):
        download('http://example.invalid/file.bin', 'file.bin')
    assert not paused and is_setting(SSLError('[SSL: CERTIFICATE_VERIFY_FAILED] certificate')) and not is_setting(SSLError('EOF'))
    monkeypatch.setenv('NANO_CACHE', '~nosuchuser/x')
    with pytest.raises(UserError, match='~nosuchuser/x: there is no such home folder for downloads: name another folder'):
        cache_folder()


def test_server_recovers(server):
    server.faults = [500, 503, 429]
    assert download(server.url + 'file.bin', 'file.bin').read_bytes() == CONTENT


@pytest.mark.parametrize('faults, reason', [
    ([404], 'HTTP 404'), ([500] * 4, 'HTTP 500'), (['cut'] * 4, 'ChunkedEncodingError')])
def test_given_up(server, faults, reason):
    server.faults = list(faults)
    with pytest.raises(UserError) as error:
        download(server.url + 'file.bin', 'file.bin')
    url, path = server.url + 'file.bin', server.cache / 'file.bin'
    assert str(error.value) == f'{url} cannot be downloaded ({reason}); run this again to resume it, or copy the file to {path}'
    assert len(server.ranges) == len(faults)
    assert download(server.url + 'file.bin', 'file.bin', SHA256).read_bytes() == CONTENT


def test_nobody_listens(server):
    with pytest.raises(UserError, match=r'cannot be downloaded \(ConnectionError\); run this again .* copy the file to '):
        download('http://127.0.0.1:9/file.bin', 'file.bin')


@pytest.mark.parametrize('digest', [SHA256, MD5, ''])
def test_wrong_content_is_not_kept(server, digest):
    server.files['file.bin'] = b'damaged'
    url = server.url + ('file.bin' if digest else 'linked/file.bin')
    found = hashlib.new('md5' if digest == MD5 else 'sha256', b'damaged').hexdigest()
    with pytest.raises(UserError, match=f'file.bin: .* is {found}, expected {digest or SHA256}; the download has been deleted'):
        download(url, 'file.bin', digest)
    assert [path.name for path in server.cache.iterdir()] == ['file.bin.lock']
    server.files['file.bin'] = CONTENT
    assert download(url, 'file.bin', digest).read_bytes() == CONTENT


def test_damaged_part_costs_one_failure(server):
    leave_part(server, b'damaged')
    with pytest.raises(UserError, match='run this again'):
        download(server.url + 'file.bin', 'file.bin', SHA256)
    assert download(server.url + 'file.bin', 'file.bin', SHA256).read_bytes() == CONTENT


def test_wrong_file_in_the_cache(server):
    server.cache.mkdir()
    (server.cache / 'file.bin').write_bytes(b'mine')
    with pytest.raises(UserError, match=f'file.bin: sha256 is .*, expected {SHA256}; delete it and run this again'):
        download(server.url + 'file.bin', 'file.bin', SHA256)
    assert (server.cache / 'file.bin').read_bytes() == b'mine' and not server.ranges


def test_hash_told_by_the_server():
    def answer(tag):
        return SimpleNamespace(headers={'X-Linked-Etag': tag}, history=[])
    assert module.server_digest(answer(f'"{SHA256}"')) == SHA256
    assert module.server_digest(answer(f'"{SHA256[:40]}"')) == module.server_digest(answer('')) == ''  # 40 digits: not of the content


def test_cache_folder_is_a_file(server):
    server.cache.write_text('')
    with pytest.raises(UserError, match='cache is a file or a link to nothing: remove it, or set NANO_CACHE to another folder'):
        download(server.url + 'file.bin', 'file.bin')


def test_a_file_of_another_user(server, monkeypatch):
    """Or too many open files: the reason, and not that the file is damaged."""
    server.cache.mkdir()
    (server.cache / 'file.bin').write_bytes(CONTENT)

    def forbid(path, mode):
        raise PermissionError(13, 'Permission denied', path)
    monkeypatch.setattr(module, 'open', forbid, raising=False)
    with pytest.raises(UserError, match='file.bin cannot be read or written .Permission denied.; get permission, free disk space, or'):
        download(server.url + 'file.bin', 'file.bin')


def test_two_processes_fetch_a_file_once(server):
    """The second one waits; two that append to one part would both damage it."""
    server.files['file.bin'] = CONTENT
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download(server.url + 'file.bin', 'file.bin', SHA256), range(4)))
    assert len(server.ranges) == 1 and len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT


def test_two_processes_on_a_file_system_that_does_not_lock(server, monkeypatch):
    """As Lustre with localflock on two nodes. The length of the file tells, where there is no digest."""
    monkeypatch.setattr(module, 'waiting', lambda *_: nullcontext())
    leave_part(server, CONTENT[:1000])
    server.faults = ['beside']
    assert download(server.url + 'file.bin', 'file.bin').read_bytes() == CONTENT
    assert server.ranges == ['bytes=1000-', f'bytes={len(CONTENT) + 100}-', 'bytes=0-']


def test_no_home(monkeypatch):
    """A user id without an entry, as in containers."""
    monkeypatch.delenv('NANO_CACHE', raising=False)
    monkeypatch.setattr('os.path.expanduser', lambda path: path)  # as it answers then
    with pytest.raises(UserError, match='no such home folder for downloads: name another folder in the variable NANO_CACHE'):
        cache_folder()
    monkeypatch.setenv('NANO_CACHE', 'cache')
    assert cache_folder() == Path('cache')


@pytest.mark.parametrize('kind', ['text/html; charset=utf-8', 'application/xhtml+xml'])
def test_the_page_of_a_network_is_no_file(server, kind):
    """Some networks answer every request with a page for their login."""
    server.headers = {'Content-Type': kind}
    with pytest.raises(UserError, match='file.bin: a web page instead of the file; does the network ask for a login'):
        download(server.url + 'file.bin', 'file.bin')
    assert not (server.cache / 'file.bin').exists()
