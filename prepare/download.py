"""
Downloads into one cache folder: each file once, resumed after an interruption, checked by its hash.

On a machine without internet, copy the files into the cache folder under the names in the error messages.
"""
import hashlib
import os
import re
import time
from email.utils import formatdate
from pathlib import Path

import requests
from tqdm import tqdm

from config import UserError
from engine.processes import waiting

TIMEOUT = 10, 60    # seconds to wait for a connection, and for the next bytes
VALIDATORS = 'ETag', 'Last-Modified'  # headers that tell versions of a file apart (RFC 9110, section 8.8)
PAUSES = 1, 3, 10   # seconds before the second, third and last attempt
HTML = 'text/html', 'application/xhtml+xml'
CONNECTION = 'address, proxy or certificates (HTTPS_PROXY, REQUESTS_CA_BUNDLE)'
PAGE = 'a web page instead of the file; does the network ask for a login?'


def cache_folder():
    """The folder of downloads: NANO_CACHE, or ~/.cache/nanofm. Raises UserError."""
    folder = os.environ.get('NANO_CACHE') or '~/.cache/nanofm'
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise UserError(f'{folder}: there is no such home folder for downloads: name another folder in the variable '
                        'NANO_CACHE')


def download(url, name, digest=''):
    """The path of the file `name` (it may contain '/') in the cache folder, downloaded from url if it is missing.

    digest: hex, 64 characters of SHA-256 or 32 of MD5; without one, a download is checked against the SHA-256 of the
    server's headers, if there is one. Raises UserError if the file cannot be downloaded, cannot be written or has
    another digest.
    """
    path = cache_folder() / name
    try:
        if not path.is_file():
            fetch_once(url, path, digest)
        elif fault := unusable(path) or mismatch(path, digest):
            raise UserError(f'{path}: {fault}; delete it and run this again, or copy the right file there from {url}')
    except (requests.RequestException, ValueError) as error:  # ValueError: of urllib3, a malformed address
        reason = f'HTTP {status_of(error)}' if status_of(error) else type(error).__name__
        reason += f': {error}' * is_setting(error)
        remedy = f'correct the {CONNECTION}' if is_setting(error) else 'run this again to resume it'
        raise UserError(f'{url} cannot be downloaded ({reason}); {remedy}, or copy the file to {path}')
    except OSError as error:
        if not error.strerror:  # requests: the file of certificates is missing
            raise UserError(f'{url} cannot be downloaded ({error}); correct the {CONNECTION}')
        raise UserError(f'{path} cannot be read or written ({error.strerror}); get permission, free disk space, or set '
                        'NANO_CACHE to another folder')
    return path


def status_of(error):
    """The HTTP status in an error of requests, otherwise None."""
    return getattr(getattr(error, 'response', None), 'status_code', None)


def is_setting(error):
    """Whether the fault is one of an address, a proxy or a certificate, which another attempt cannot mend."""
    return isinstance(error, (ValueError, requests.exceptions.ProxyError)) or 'CERTIFICATE_VERIFY_FAILED' in str(error)


def unusable(path):
    """A message if a file is empty, a web page or a pointer of Git LFS, otherwise ''."""
    with open(path, 'rb') as file:
        start = file.read(1000).lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if not start:
        return 'an empty file'
    if start.startswith(b'version https://git-lfs'):
        return 'a pointer of Git LFS instead of the file'
    page = re.match(rb'(<\?xml.*?\?>|<!--.*?-->|\s)*+<(!doctype\s+)?html', start, re.DOTALL)
    return PAGE if page else ''


def mismatch(path, digest):
    """A message if the file has another digest, otherwise ''; also '' if no digest is given."""
    if not digest:
        return ''
    kind = 'md5' if len(digest) == 32 else 'sha256'
    with open(path, 'rb') as file:
        found = hashlib.file_digest(file, kind).hexdigest()  # reads in blocks
    return '' if found == digest.lower() else f'{kind} is {found}, expected {digest}'


def fetch_once(url, path, digest):
    """Downloads a file. Of two processes, the second one waits and finds it."""
    with waiting(f'{path}.lock', 'set NANO_CACHE to another folder'):
        if path.is_file():
            return
        part = path.with_name(f'{path.name}.part')
        from_server = fetch(url, part)
        part.with_suffix('.version').unlink(missing_ok=True)
        if fault := unusable(part) or mismatch(part, digest or from_server):
            part.unlink()  # or the next run would resume it
            raise UserError(f'{url}: {fault}; the download has been deleted, run this again')
        os.replace(part, path)


def fetch(url, part):
    """Completes the file `part`, in up to four attempts; returns the SHA-256 of the server's headers, or ''."""
    print(f'downloading {url}')
    for pause in (*PAUSES, None):
        try:
            return stream(url, part)
        except requests.RequestException as error:
            status = status_of(error)
            final = is_setting(error) or status and status < 500 and status != 429
            if pause is None or final:
                raise
            print(f'{type(error).__name__}: trying again in {pause} s')
            time.sleep(pause)


def stream(url, part):
    """One attempt: appends the missing bytes to `part`. An incomplete transfer raises an error of requests.

    The total size, ETag and date of the file are kept in a file .version: a part of another version is dropped.
    """
    part.touch()
    size, version = part.stat().st_size, part.with_suffix('.version')
    headers = {'Range': f'bytes={size}-', 'Accept-Encoding': 'identity'}  # identity: not compressed
    if size:  # otherwise 412: the part is of an older file
        headers['If-Unmodified-Since'] = formatdate(part.stat().st_mtime, usegmt=True)
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, sent = response.status_code, response.headers.get('Content-Range', '')  # 'bytes FIRST-LAST/TOTAL'
        left = response.raw.length_remaining or 0  # None: no Content-Length, or no number
        told = [sent.rpartition('/')[2] or str(left or ''), *(response.headers.get(name, '') for name in VALIDATORS)]
        before = version.read_text(encoding='utf-8').split('\n') if size and version.is_file() else []
        other = any(a and b and a != b for a, b in zip(told, before))  # an answer may lack one of them
        if told[0] in ('', '*') and told[1:] == before[1:]:
            told[0] = before[0]  # the size by an earlier answer
        if status == 416 and sent == f'bytes */{size}' and not other:  # nothing is left
            return server_digest(response)
        if status in (412, 416) or status == 206 and (other or not sent.startswith(f'bytes {size}-')):
            part.unlink()
            raise requests.ConnectionError('the partial download does not belong to this file')
        response.raise_for_status()
        if status not in (200, 204, 206):
            raise UserError(f'{url}: the server answers {status} in place of the file; run this again later')
        if response.headers.get('Content-Encoding', 'identity') != 'identity' and not part.stem.endswith('.gz'):
            raise UserError(f'{url}: the server sends it compressed, although asked not to; copy the file to '
                            f'{part.with_suffix("")} from elsewhere')
        if response.headers.get('Content-Type', '').startswith(HTML):
            raise UserError(f'{url}: {PAGE}')
        size *= response.status_code == 206  # 200: the server has no ranges and sends the whole file
        if not size:
            version.write_text('\n'.join(told), encoding='utf-8')
        response.raw.headers.discard('Content-Encoding')  # the bytes as sent: requests would unpack a .gz
        with (open(part, 'ab' if size else 'wb') as file,
              tqdm(desc=part.stem, initial=size, total=size + left or None, unit='B', unit_scale=True,
                   disable=None) as bar):
            for block in response.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))
        if told[0] not in ('', '*', str(part.stat().st_size)):  # the connection ended, or another process writes too
            raise requests.ConnectionError('the file has another size than the server says')
        return server_digest(response)


def server_digest(response):
    """The SHA-256 of a large file on the Hugging Face Hub, from the headers of the redirect to its storage; otherwise
    ''."""
    tags = [one.headers.get('X-Linked-Etag', '').strip('"') for one in (*response.history, response)]
    return next((tag for tag in tags if re.fullmatch('[0-9a-f]{64}', tag)), '')
