package splice

import (
	"errors"
	"io"
	"net"
)

// Copy writes early, and then what from has, until the end of its stream, which is no error, or until it fails. add is
// told of every piece how many bytes it had. After the end the caller closes to, or its direction: the kernel may keep
// the last bytes for the FIN.
func Copy(to net.Conn, from *Reader, early []byte, add func(int)) error {
	if len(early) > 0 {
		n, err := to.Write(early)
		add(n)
		if err != nil {
			return err
		}
	}
	if d := newDirect(to, from.conn); d != nil {
		for {
			n, err := d.toSocket()
			add(n)
			if err != nil {
				return endOr(err)
			}
		}
	}
	d := newDirect(from.conn, to)
	for {
		b, n, err := from.Next()
		if err != nil {
			return endOr(err)
		}
		bulk := n == len(b)
		n, err = to.Write(b[:n])
		Put(b)
		add(n)
		if err != nil {
			return err
		}
		for bulk && d != nil {
			// While the socket has much to give it fills the other side's buffers, which are too large for little.
			n, err := d.fromSocket()
			add(n)
			if err != nil {
				return err
			}
			bulk = n >= directLeast
		}
	}
}

// endOr makes nil of the error that says that the source has ended.
func endOr(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
