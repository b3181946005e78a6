"""
Files from the internet, kept in one cache folder: fetched once, taken up where a broken download stopped, checked by their hash.

A machine without internet needs nothing but the files themselves, copied into the cache folder under the names that errors give.
"""
import hashlib
import os
import re
import time
from pathlib import Path

import requests
from tqdm import tqdm

from config import UserError

TIMEOUT = 10, 60    # seconds to wait for a connection, and for the next bytes
PAUSES = 1, 3, 10   # seconds before the second, third and last attempt


def cache_folder():
    """Where downloads are kept: NANO_CACHE, or a folder in the user's cache directory."""
    return Path(os.environ.get('NANO_CACHE') or Path.home() / '.cache' / 'nanofm')


def download(url, name, digest=''):
    """The path of the file `name` (it may contain '/') in the cache folder, fetched from url if it is not there.

    digest: hex, 64 characters of SHA-256 or 32 of MD5; without one, a download is checked against the SHA-256 that its server
    tells, if it does. Raises UserError where the file cannot be had, cannot be written or is not the expected one.
    """
    path = cache_folder() / name
    part = path.with_name(f'{path.name}.part')
    if path.is_file():
        if fault := mismatch(path, digest):
            raise UserError(f'{path}: {fault}; delete it and run this again, or copy the right file there from {url}')
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        told = fetch(url, part)
        if fault := mismatch(part, digest or told):
            part.unlink()  # or the next run would go on with it
            raise UserError(f'{url}: {fault}; the download has been deleted, run this again')
        os.replace(part, path)
    except requests.RequestException as error:
        reason = type(error).__name__ if error.response is None else f'HTTP {error.response.status_code}'
        raise UserError(f'{url} cannot be had ({reason}); run this again to go on with it, or copy the file to {path}')
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror}); make room, or set NANO_CACHE to another folder')
    return path


def mismatch(path, digest):
    """What is wrong with the file's hash, '' if nothing is or no digest is known."""
    if not digest:
        return ''
    kind = 'md5' if len(digest) == 32 else 'sha256'
    with open(path, 'rb') as file:
        found = hashlib.file_digest(file, kind).hexdigest()  # reads in blocks
    return '' if found == digest.lower() else f'{kind} is {found}, expected {digest}'


def fetch(url, part):
    """Completes the file `part`, in several attempts if need be; returns the SHA-256 that the server tells, or ''."""
    print(f'downloading {url}')
    for pause in (*PAUSES, None):
        try:
            return stream(url, part)
        except requests.RequestException as error:
            final = error.response is not None and error.response.status_code < 500 and error.response.status_code != 429
            if pause is None or final:
                raise
            print(f'{type(error).__name__}: trying again in {pause} s')
            time.sleep(pause)


def stream(url, part):
    """One attempt: appends the bytes that `part` lacks. A stream cut short raises one of requests' errors."""
    part.touch()
    size = part.stat().st_size
    headers = {'Range': f'bytes={size}-', 'Accept-Encoding': 'identity'}  # identity: bytes as they are stored, not compressed
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:  # there is nothing from `size` on: the part is complete, or longer than the file
            if answer.headers.get('Content-Range') != f'bytes */{size}':
                part.unlink()
                raise requests.ConnectionError('the partial download does not belong to this file')
            return told_digest(answer)
        answer.raise_for_status()
        size *= answer.status_code == 206  # 200: the server knows no ranges and sends everything
        left = int(answer.headers.get('Content-Length', 0))
        with (open(part, 'ab' if size else 'wb') as file,
              tqdm(desc=part.stem, initial=size, total=size + left or None, unit='B', unit_scale=True, disable=None) as bar):
            for block in answer.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))
        return told_digest(answer)


def told_digest(answer):
    """The SHA-256 of a large file on the Hugging Face Hub, which stands in the answer that redirects to the storage; else ''."""
    tags = [one.headers.get('X-Linked-Etag', '').strip('"') for one in (*answer.history, answer)]
    return next((tag for tag in tags if re.fullmatch('[0-9a-f]{64}', tag)), '')
