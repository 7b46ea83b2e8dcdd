"""Sends datagrams that an attacker could send to the server's port.

usage: hostile.py KIND CAPTURE ADDRESS PORT

KIND is garbage (random bytes of every small size and type), truncated (beginnings
of captured datagrams), replayed (captured datagrams as they were) or forged
(captured datagrams with one bit turned). Prints how many were sent.
"""

import random
import socket
import struct
import sys
import time

LINUX_SLL2, LINUX_SLL, ETHERNET = 276, 113, 1


def datagrams(path, port):
    """The payloads of UDP over IPv4 to the port, from a capture file."""
    data = open(path, "rb").read()
    if struct.unpack("<I", data[:4])[0] != 0xA1B2C3D4:
        raise SystemExit("not a capture file")
    link = struct.unpack("<I", data[20:24])[0]
    skip = {LINUX_SLL2: 20, LINUX_SLL: 16, ETHERNET: 14}[link]
    at, found = 24, []
    while at + 16 <= len(data):
        size, full = struct.unpack("<II", data[at + 8 : at + 16])
        packet, at = data[at + 16 + skip : at + 16 + size], at + 16 + size
        if size != full or len(packet) < 28 or packet[0] >> 4 != 4 or packet[9] != 17:
            continue
        udp = packet[(packet[0] & 15) * 4 :]
        if struct.unpack(">H", udp[2:4])[0] == port and udp[8:] not in found:
            found.append(udp[8:])
    return found


def make(kind, real):
    r = random.Random(7)
    if kind == "garbage":
        for size in list(range(0, 200)) + [500, 1200, 1400, 1472, 4000, 65000]:
            yield r.randbytes(size)
            if size:
                for first in range(0, 8):
                    yield bytes([first]) + r.randbytes(size - 1)
    while kind != "garbage":
        for p in real:
            if kind == "truncated":
                yield p[: r.randrange(0, len(p))]
            elif kind == "replayed":
                yield p
            elif kind == "forged":
                at = r.randrange(1, len(p))
                yield p[:at] + bytes([p[at] ^ 1 << r.randrange(8)]) + p[at + 1 :]


def main():
    kind, path, host, port = sys.argv[1:]
    real = datagrams(path, int(port))
    if not real and kind != "garbage":
        raise SystemExit("the capture has no datagram to the server")
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sent = 0
    for data in make(kind, real):
        s.sendto(data, (host, int(port)))
        sent += 1
        if sent % 50 == 0:
            time.sleep(0.01)
        if sent == 2000:
            break
    print(sent)


main()
