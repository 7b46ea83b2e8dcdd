"""A SOCKS client written for the tests with nothing but Python's library.

usage: socks.py [--proxy HOST:PORT] [--auth USER:PASSWORD] COMMAND ...

  connect HOST PORT [TEXT]  print the reply code; with a code of 0 and TEXT, send
                            it, close the sending half and print all that comes
  connect4 HOST PORT        the same in SOCKS4a; prints the reply code (90 is yes)
  resolve NAME              Tor's RESOLVE; print the reply code and the address
  ptr ADDRESS               Tor's RESOLVE_PTR; print the reply code and the name
  bind HOST PORT            BIND; print each reply's code and address as it comes,
                            then five bytes from the peer, and answer "pong"
  forward PORT HOST PORT    UDP ASSOCIATE; carry datagrams between UDP port PORT of
                            127.0.0.1 and the target until stdin ends
  raw HEX                   send bytes; print what comes back, in hex, and the end:
                            closed, reset, or open when there was none
  kept HOST PORT PATH       one connection; for every line on stdin, a GET on it;
                            print the status
"""

import argparse
import ipaddress
import select
import socket
import struct
import sys

TIMEOUT = 60


def read(s, n):
    data = b""
    while len(data) < n:
        part = s.recv(n - len(data))
        if not part:
            raise EOFError(f"closed after {len(data)} of {n} bytes")
        data += part
    return data


def encode(host, port):
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.encode("ascii")
        return b"\x03" + bytes([len(name)]) + name + struct.pack(">H", port)
    kind = b"\x01" if address.version == 4 else b"\x04"
    return kind + address.packed + struct.pack(">H", port)


def decode(take):
    """take(n) gives the next n bytes."""
    kind = take(1)[0]
    if kind == 1:
        host = str(ipaddress.IPv4Address(take(4)))
    elif kind == 4:
        host = str(ipaddress.IPv6Address(take(16)))
    elif kind == 3:
        host = take(take(1)[0]).decode("ascii")
    else:
        raise ValueError(f"address type {kind}")
    return host, struct.unpack(">H", take(2))[0]


def open_proxy(args):
    host, port = args.proxy.rsplit(":", 1)
    s = socket.create_connection((host, int(port)), TIMEOUT)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s


def negotiate(s, args):
    if args.auth:
        s.sendall(b"\x05\x02\x00\x02")
    else:
        s.sendall(b"\x05\x01\x00")
    version, method = read(s, 2)
    if version != 5:
        raise ValueError(f"version {version}")
    if method == 0xFF:
        return "no acceptable method"
    if method == 2:
        user, password = (x.encode() for x in args.auth.split(":", 1))
        s.sendall(b"\x01" + bytes([len(user)]) + user + bytes([len(password)]) + password)
        if read(s, 2)[1] != 0:
            return "wrong user or password"
    return ""


def reply(s):
    version, code, _ = read(s, 3)
    if version != 5:
        raise ValueError(f"version {version}")
    host, port = decode(lambda n: read(s, n))
    return code, host, port


def request(args, command, host, port):
    s = open_proxy(args)
    refused = negotiate(s, args)
    if refused:
        print(refused)
        sys.exit(3)
    s.sendall(bytes([5, command, 0]) + encode(host, port))
    return s


def connect(args):
    s = request(args, 1, args.host, args.port)
    code, _, _ = reply(s)
    print(code, flush=True)
    if code == 0 and args.text is not None:
        s.sendall(args.text.encode().decode("unicode_escape").encode("latin-1"))
        s.shutdown(socket.SHUT_WR)
        while part := s.recv(65536):
            sys.stdout.buffer.write(part)


def connect4(args):
    s = open_proxy(args)
    name = args.host.encode("ascii")
    s.sendall(struct.pack(">BBH", 4, 1, args.port) + b"\0\0\0\1" + b"tester\0" + name + b"\0")
    version, code = read(s, 8)[:2]
    print(code if version == 0 else f"version {version}")


def resolve(args):
    s = request(args, 0xF0, args.name, 0)
    code, host, _ = reply(s)
    print(code, host if code == 0 else "")


def ptr(args):
    s = request(args, 0xF1, args.address, 0)
    code, host, _ = reply(s)
    print(code, host if code == 0 else "")


def bind(args):
    s = request(args, 2, args.host, args.port)
    for _ in range(2):
        code, host, port = reply(s)
        print(code, host, port, flush=True)
        if code != 0:
            return
    print(read(s, 5).decode(), flush=True)
    s.sendall(b"pong\n")
    s.shutdown(socket.SHUT_WR)


def forward(args):
    s = request(args, 3, "0.0.0.0", 0)
    code, host, port = reply(s)
    if code != 0:
        print("reply", code)
        sys.exit(1)
    if ipaddress.ip_address(host).is_unspecified:
        host = s.getpeername()[0]
    near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    near.bind(("127.0.0.1", args.near))
    far = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    far.connect((host, port))
    print("ready", flush=True)
    asked = None
    while True:
        ready, _, _ = select.select([near, far, s, sys.stdin], [], [])
        if near in ready:
            data, asked = near.recvfrom(65536)
            far.send(b"\0\0\0" + encode(args.host, args.port) + data)
        if far in ready:
            data = far.recv(65536)
            at = 3

            def take(n):
                nonlocal at
                at += n
                return data[at - n : at]

            source = decode(take)
            print("from", *source, flush=True)
            near.sendto(data[at:], asked)
        if s in ready or sys.stdin in ready:
            return


def raw(args):
    s = open_proxy(args)
    s.settimeout(20)
    s.sendall(bytes.fromhex(args.hex))
    got, end = b"", "closed"
    try:
        while part := s.recv(65536):
            got += part
    except ConnectionResetError:
        end = "reset"
    except TimeoutError:
        end = "open"
    print(got.hex(), end)


def kept(args):
    s = request(args, 1, args.host, args.port)
    code, _, _ = reply(s)
    if code != 0:
        print("reply", code)
        sys.exit(1)
    print("connected", flush=True)
    stream = s.makefile("rb")
    for _ in sys.stdin:
        s.sendall(f"GET {args.path} HTTP/1.1\r\nHost: {args.host}\r\n\r\n".encode())
        status = stream.readline().split()[1].decode()
        length = 0
        while (line := stream.readline().strip()) != b"":
            key, value = line.split(b":", 1)
            if key.lower() == b"content-length":
                length = int(value)
        stream.read(length)
        print(status, flush=True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--proxy", default="127.0.0.1:1080")
    p.add_argument("--auth")
    sub = p.add_subparsers(required=True)

    def command(f, *names):
        c = sub.add_parser(f.__name__)
        c.set_defaults(run=f)
        for n in names:
            if n in ("port", "near"):
                c.add_argument(n, type=int)
            elif n == "text":
                c.add_argument(n, nargs="?")
            else:
                c.add_argument(n)

    command(connect, "host", "port", "text")
    command(connect4, "host", "port")
    command(resolve, "name")
    command(ptr, "address")
    command(bind, "host", "port")
    command(forward, "near", "host", "port")
    command(raw, "hex")
    command(kept, "host", "port", "path")
    args = p.parse_args()
    args.run(args)


main()
