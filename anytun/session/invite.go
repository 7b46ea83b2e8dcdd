package session

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
)

// Invite is all that a client needs to use a cluster, as one URL:
//
//	anytun://host:port?key=CLUSTER_PUBLIC_KEY&secret=CLIENT_PRIVATE_KEY&name=NAME
//
// Without secret it names a cluster only, and the client brings its own key.
type Invite struct {
	Address   string // host:port of the service address
	ServerKey PublicKey
	Key       PrivateKey // zero when the URL has none
	Name      string     // what the operator calls the client; may be empty
}

// ErrInvite says that a text isn't an invite.
var ErrInvite = errors.New("not an anytun:// URL")

// ParseInvite reads an invite. The error never repeats the URL, which holds a
// secret.
func ParseInvite(s string) (Invite, error) {
	var in Invite
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "anytun" || u.Opaque != "" {
		return in, ErrInvite
	}
	if u.User != nil || u.Path != "" && u.Path != "/" || u.Fragment != "" {
		return in, fmt.Errorf("%w: only host, port, key, secret and name may stand in it", ErrInvite)
	}
	host, port, err := net.SplitHostPort(u.Host)
	if err != nil || host == "" {
		return in, fmt.Errorf("%w: host:port is missing", ErrInvite)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return in, fmt.Errorf("%w: bad port", ErrInvite)
	}
	in.Address = net.JoinHostPort(host, port)
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return in, fmt.Errorf("%w: bad query", ErrInvite)
	}
	for k, v := range q {
		if k != "key" && k != "secret" && k != "name" || len(v) != 1 {
			return in, fmt.Errorf("%w: key, secret and name may each stand in it once, nothing else", ErrInvite)
		}
	}
	if in.ServerKey, err = ParsePublicKey(q.Get("key")); err != nil {
		return in, fmt.Errorf("%w: key: %w", ErrInvite, err)
	}
	if s := q.Get("secret"); s != "" {
		if in.Key, err = ParsePrivateKey(s); err != nil {
			return in, fmt.Errorf("%w: secret: %w", ErrInvite, err)
		}
	}
	in.Name = q.Get("name")
	return in, nil
}

// String returns the URL, with the client's secret key in it.
func (in Invite) String() string {
	enc := base64.RawURLEncoding
	s := "anytun://" + in.Address + "?key=" + enc.EncodeToString(in.ServerKey[:])
	if in.Key != (PrivateKey{}) {
		s += "&secret=" + enc.EncodeToString(in.Key[:])
	}
	if in.Name != "" {
		s += "&name=" + url.QueryEscape(in.Name)
	}
	return s
}

// Redacted is String without the secret, for logs.
func (in Invite) Redacted() string {
	in.Key = PrivateKey{}
	return in.String()
}
