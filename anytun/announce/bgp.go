package announce

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/config/oc"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"
)

const (
	sentWait = time.Second      // for the withdrawal to be written to the sessions
	stopWait = 10 * time.Second // for the engine to end
	poll     = 5 * time.Millisecond
)

// engine is the BGP speaker: one session a peer, and a table that holds our
// prefixes or nothing. turn, wish and stop are for one goroutine (Announcer.run);
// peers and trouble are safe from anywhere.
type engine struct {
	cfg *Config
	log *slog.Logger

	label string         // marks the goroutines of srv, see ended
	links []link         // as Config.Peers
	want  bool           // what wish said last
	told  bool           // what srv's table holds
	sent  map[int]uint64 // by peer: updates it must have been sent for the withdrawal to be out

	mu  sync.Mutex        // below: written by turn and stop, read by peers and trouble
	srv *server.BgpServer // nil before start and after stop
	why string            // why srv couldn't be started
}

// link is what the engine forgets about a session.
type link struct {
	added bool
	up    bool      // was established when last looked at
	bfd   bool      // BFD is on
	lost  time.Time // guarded by engine.mu, as why
	why   string    // why it isn't added
}

func newEngine(cfg *Config) *engine {
	return &engine{cfg: cfg, log: cfg.Logger, links: make([]link, len(cfg.Peers))}
}

// wish makes the table hold our prefixes, or nothing.
func (e *engine) wish(announce bool) {
	e.want = announce
	e.tell()
}

// turn does what couldn't be done before: start, add peers whose way wasn't
// known, and begin sessions anew that were lost.
func (e *engine) turn() {
	if e.srv == nil {
		err := e.start()
		if e.setTrouble(err); err != nil {
			return
		}
	}
	for i := range e.links {
		if e.links[i].added {
			continue
		}
		err := e.add(i)
		e.links[i].added = err == nil
		e.setWhy(i, err)
	}
	e.tell()
	e.follow()
}

func (e *engine) setTrouble(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		e.why = ""
	} else if e.why != err.Error() { // log a change only
		e.why = err.Error()
		e.log.Warn("bgp can't start", "err", err)
	}
}

func (e *engine) setWhy(i int, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		e.links[i].why = ""
	} else if e.links[i].why != err.Error() {
		e.links[i].why = err.Error()
		e.log.Warn("bgp peer has to wait", "peer", e.cfg.Peers[i], "err", err)
	}
}

func (e *engine) start() error {
	id := e.cfg.RouterID
	if !id.IsValid() {
		i := slices.IndexFunc(e.cfg.Peers, func(p Peer) bool { return p.Addr.Is4() })
		var err error
		if id = e.cfg.Peers[i].Local; !id.IsValid() {
			if id, err = localTowards(e.cfg.Peers[i].Addr); err != nil {
				return fmt.Errorf("no router id: %w", err)
			}
		}
		if e.ours(id) {
			return fmt.Errorf("no router id: %s, the address towards %s, is one that is announced", id, e.cfg.Peers[i].Addr)
		}
	}
	e.label = fmt.Sprintf("%p", e) // unlike that of any other engine
	var srv *server.BgpServer
	pprof.Do(context.Background(), pprof.Labels(labelKey, e.label), func(context.Context) {
		srv = server.NewBgpServer(server.LoggerOption(slog.New(newEngineLog(e.log.Handler())), nil))
		go srv.Serve()
	})
	port := int32(-1) // none
	if e.cfg.ListenPort != 0 {
		port = int32(e.cfg.ListenPort)
	}
	err := srv.StartBgp(context.Background(), &api.StartBgpRequest{Global: &api.Global{
		Asn: e.cfg.AS, RouterId: id.String(), ListenPort: port,
		Families: []uint32{
			uint32(oc.AfiSafiTypeToIntMap[oc.AFI_SAFI_TYPE_IPV4_UNICAST]),
			uint32(oc.AfiSafiTypeToIntMap[oc.AFI_SAFI_TYPE_IPV6_UNICAST]),
		},
	}})
	if err == nil {
		err = refuse(srv)
	}
	if err != nil {
		srv.Stop()
		return errors.Join(err, e.ended())
	}
	e.mu.Lock()
	e.srv = srv
	e.mu.Unlock()
	e.log.Debug("bgp started", "router", id, "as", e.cfg.AS)
	return nil
}

// refuse makes a speaker take in nothing but what it announces itself: what
// peers announce is none of our business, and none of other peers'.
func refuse(srv *server.BgpServer) error {
	ctx, name := context.Background(), "own"
	err := srv.AddPolicy(ctx, &api.AddPolicyRequest{Policy: &api.Policy{Name: name, Statements: []*api.Statement{{
		Name:       name,
		Conditions: &api.Conditions{RouteType: api.Conditions_ROUTE_TYPE_LOCAL},
		Actions:    &api.Actions{RouteAction: api.RouteAction_ROUTE_ACTION_ACCEPT},
	}}}})
	if err != nil {
		return err
	}
	return srv.SetPolicyAssignment(ctx, &api.SetPolicyAssignmentRequest{Assignment: &api.PolicyAssignment{
		Name: "global", Direction: api.PolicyDirection_POLICY_DIRECTION_IMPORT,
		Policies: []*api.Policy{{Name: name}}, DefaultAction: api.RouteAction_ROUTE_ACTION_REJECT,
	}})
}

func (e *engine) ours(a netip.Addr) bool {
	return slices.ContainsFunc(e.cfg.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// has reports whether there are prefixes of a family.
func (e *engine) has(v4 bool) bool {
	return slices.ContainsFunc(e.cfg.Prefixes, func(p netip.Prefix) bool { return p.Addr().Is4() == v4 })
}

func family(v4 bool) *api.Family {
	if v4 {
		return &api.Family{Afi: api.Family_AFI_IP, Safi: api.Family_SAFI_UNICAST}
	}
	return &api.Family{Afi: api.Family_AFI_IP6, Safi: api.Family_SAFI_UNICAST}
}

// add makes the session with a peer, after the policy that sets the next hop of
// the prefixes whose family isn't the session's.
func (e *engine) add(i int) error {
	p := &e.cfg.Peers[i]
	if v4 := p.Addr.Is4(); e.has(!v4) {
		hop, err := e.nextHop(p)
		switch {
		case err == nil:
			if err = e.setNextHop(p, hop); err != nil {
				return err
			}
		case !v4 && errors.Is(err, errNoNextHop): // RFC 8950: IPv4 by an IPv6 next hop
		default:
			return err
		}
	}
	return e.addPeer(i)
}

func (e *engine) nextHop(p *Peer) (netip.Addr, error) {
	if p.NextHop.IsValid() {
		return p.NextHop, nil
	}
	local := p.Local
	if !local.IsValid() {
		var err error
		if local, err = localTowards(p.Addr); err != nil {
			return netip.Addr{}, err
		}
	}
	return otherFamily(local, e.ours)
}

func (e *engine) setNextHop(p *Peer, hop netip.Addr) error {
	ctx, name := context.Background(), "next-hop-"+p.Addr.String()
	err := e.srv.AddDefinedSet(ctx, &api.AddDefinedSetRequest{Replace: true, DefinedSet: &api.DefinedSet{
		DefinedType: api.DefinedType_DEFINED_TYPE_NEIGHBOR, Name: name,
		List: []string{netip.PrefixFrom(p.Addr, p.Addr.BitLen()).String()},
	}})
	if err != nil {
		return fmt.Errorf("set next hop: %w", err)
	}
	policy := &api.Policy{Name: name, Statements: []*api.Statement{{
		Name: name,
		Conditions: &api.Conditions{
			NeighborSet: &api.MatchSet{Type: api.MatchSet_TYPE_ANY, Name: name},
			AfiSafiIn:   []*api.Family{family(hop.Is4())},
		},
		Actions: &api.Actions{
			RouteAction: api.RouteAction_ROUTE_ACTION_ACCEPT,
			Nexthop:     &api.NexthopAction{Address: hop.WithZone("").String()},
		},
	}}}
	if err := e.srv.AddPolicy(ctx, &api.AddPolicyRequest{Policy: policy}); err != nil {
		return fmt.Errorf("set next hop: %w", err)
	}
	err = e.srv.AddPolicyAssignment(ctx, &api.AddPolicyAssignmentRequest{Assignment: &api.PolicyAssignment{
		Name: "global", Direction: api.PolicyDirection_POLICY_DIRECTION_EXPORT,
		Policies: []*api.Policy{{Name: name}}, DefaultAction: api.RouteAction_ROUTE_ACTION_ACCEPT,
	}})
	if err != nil {
		return fmt.Errorf("set next hop: %w", err)
	}
	return nil
}

// peer is what the speaker is told of a peer.
func (e *engine) peer(p *Peer, bfd bool) *api.Peer {
	peer := &api.Peer{
		Conf: &api.PeerConf{NeighborAddress: p.Addr.String(), PeerAsn: p.AS, AuthPassword: p.Password},
		Timers: &api.Timers{Config: &api.TimersConfig{
			HoldTime:               uint64(e.cfg.HoldTime / time.Second),
			KeepaliveInterval:      uint64(e.cfg.HoldTime / 3 / time.Second),
			ConnectRetry:           uint64(e.cfg.ConnectRetry / time.Second),
			IdleHoldTimeAfterReset: 1, // seconds; a session that BFD ended may come back
		}},
		Transport:       &api.Transport{RemotePort: uint32(p.Port)},
		GracefulRestart: &api.GracefulRestart{Enabled: false}, // a dead server's routes go at once
	}
	if p.Local.IsValid() {
		peer.Transport.LocalAddress = p.Local.String()
	}
	for _, v4 := range []bool{true, false} {
		if e.has(v4) {
			peer.AfiSafis = append(peer.AfiSafis, &api.AfiSafi{Config: &api.AfiSafiConfig{Family: family(v4), Enabled: true}})
		}
	}
	if p.Multihop > 0 {
		peer.EbgpMultihop = &api.EbgpMultihop{Enabled: true, MultihopTtl: uint32(p.Multihop)}
	}
	if bfd {
		interval := uint32(e.cfg.BFDInterval / time.Microsecond)
		peer.Bfd = &api.BfdPeerConfig{
			Enabled: true, DesiredMinimumTxInterval: interval, RequiredMinimumReceive: interval,
			DetectionMultiplier: uint32(e.cfg.BFDMultiplier),
		}
	}
	return peer
}

// addPeer begins a session, for now without BFD.
func (e *engine) addPeer(i int) error {
	err := e.srv.AddPeer(context.Background(), &api.AddPeerRequest{Peer: e.peer(&e.cfg.Peers[i], false)})
	if err != nil {
		return fmt.Errorf("add peer: %w", err)
	}
	e.links[i].up, e.links[i].bfd = false, false
	return nil
}

// startBFD adds BFD to an established session.
func (e *engine) startBFD(i int) error {
	_, err := e.srv.UpdatePeer(context.Background(), &api.UpdatePeerRequest{Peer: e.peer(&e.cfg.Peers[i], true)})
	if err != nil {
		return fmt.Errorf("start bfd: %w", err)
	}
	e.links[i].bfd = true
	e.settle(i, true)
	return nil
}

func (e *engine) deletePeer(i int) error {
	addr := e.cfg.Peers[i].Addr.String()
	if err := e.srv.DeletePeer(context.Background(), &api.DeletePeerRequest{Address: addr}); err != nil {
		return fmt.Errorf("delete peer: %w", err)
	}
	if e.links[i].bfd {
		e.settle(i, false)
	}
	return nil
}

// settle waits until BFD has taken notice of a peer that was added or deleted.
// The engine queues such news in a channel of one place, which its main loop
// blocks on while it is full; BFD empties it only after the deleted peer's
// goroutine has ended, and that may be waiting for the main loop. With one piece
// of news at a time they never wait for each other.
func (e *engine) settle(i int, there bool) {
	p := &e.cfg.Peers[i]
	for end := time.Now().Add(stopWait); time.Now().Before(end); pause() {
		seen := false
		e.srv.ListBfdPeer(context.Background(), func(addr string, _ *api.BfdPeerState) {
			seen = seen || addr == p.Addr.String()
		})
		if seen == there {
			return
		}
	}
}

// pause is for what can only be polled.
func pause() {
	t := time.NewTimer(poll)
	<-t.C
}

// tell makes the table what is wanted, as far as there is one.
func (e *engine) tell() {
	if e.srv == nil || e.want == e.told {
		return
	}
	paths := make([]*apiutil.Path, 0, len(e.cfg.Prefixes))
	for _, p := range e.cfg.Prefixes {
		path, err := pathTo(p)
		if err != nil {
			e.setTrouble(fmt.Errorf("prefix %s: %w", p, err))
			return
		}
		paths = append(paths, path)
	}
	var err error
	if e.want {
		_, err = e.srv.AddPath(apiutil.AddPathRequest{Paths: paths})
	} else {
		e.sent = e.mustHaveSent()
		err = e.srv.DeletePath(apiutil.DeletePathRequest{Paths: paths})
	}
	if err != nil { // tried again by turn
		e.setTrouble(fmt.Errorf("tell the table: %w", err))
		return
	}
	e.setTrouble(nil)
	e.told = e.want
}

// pathTo is the route to a prefix. Its next hop is left open; each session
// puts in its own address, or what setNextHop said.
func pathTo(p netip.Prefix) (*apiutil.Path, error) {
	nlri, err := bgp.NewIPAddrPrefix(p)
	if err != nil {
		return nil, err
	}
	if p.Addr().Is4() {
		hop, err := bgp.NewPathAttributeNextHop(netip.IPv4Unspecified())
		return &apiutil.Path{
			Family: bgp.RF_IPv4_UC, Nlri: nlri,
			Attrs: []bgp.PathAttributeInterface{bgp.NewPathAttributeOrigin(bgp.BGP_ORIGIN_ATTR_TYPE_IGP), hop},
		}, err
	}
	reach, err := bgp.NewPathAttributeMpReachNLRI(bgp.RF_IPv6_UC, []bgp.PathNLRI{{NLRI: nlri}}, netip.IPv6Unspecified())
	return &apiutil.Path{
		Family: bgp.RF_IPv6_UC, Nlri: nlri,
		Attrs: []bgp.PathAttributeInterface{bgp.NewPathAttributeOrigin(bgp.BGP_ORIGIN_ATTR_TYPE_IGP), reach},
	}, err
}

// follow looks whether sessions have come or gone since it looked last.
//
// BFD runs only beside an established session, and a lost session is made anew
// as a whole. The engine on its own waits for 5 s before it connects again, and
// when BFD goes down without a session it keeps the reset that this asks for
// and ends the next session with it, as soon as that is up. The router then
// ends its BFD too, so that it goes round for ever. That BFD is no condition
// for a session is as RFC 5882, section 10.1, has it.
func (e *engine) follow() {
	for i, p := range e.list() {
		l := &e.links[i]
		if p == nil || !l.added {
			continue
		}
		up := p.GetState().GetSessionState() == api.PeerState_SESSION_STATE_ESTABLISHED
		switch {
		case l.up && !up:
			e.mu.Lock()
			l.lost = time.Now()
			e.mu.Unlock()
			delete(e.sent, i)
			err := e.deletePeer(i)
			if err == nil {
				err = e.addPeer(i)
				l.added = err == nil
			}
			e.setWhy(i, err)
		case up && e.cfg.Peers[i].BFD && !l.bfd:
			e.setWhy(i, e.startBFD(i))
		}
		l.up = up
	}
}

// list asks for all peers, in Config's order; nil where there is none.
func (e *engine) list() []*api.Peer {
	all := make([]*api.Peer, len(e.cfg.Peers))
	e.mu.Lock()
	srv := e.srv
	e.mu.Unlock()
	if srv == nil {
		return all
	}
	// The error can only be that srv has been stopped: nothing is listed then.
	_ = srv.ListPeer(context.Background(), &api.ListPeerRequest{EnableAdvertised: true}, func(p *api.Peer) {
		i := slices.IndexFunc(e.cfg.Peers, func(c Peer) bool { return c.Addr.String() == p.GetConf().GetNeighborAddress() })
		if i >= 0 {
			all[i] = p
		}
	})
	return all
}

// trouble says why there is no speaker, if so.
func (e *engine) trouble() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.why
}

func (e *engine) peers() []PeerStatus {
	list := e.list()
	out := make([]PeerStatus, len(list))
	for i, p := range list {
		s := PeerStatus{Addr: e.cfg.Peers[i].Addr, AS: e.cfg.Peers[i].AS, State: "waiting"}
		e.mu.Lock()
		s.Since, s.Why = e.links[i].lost, e.links[i].why
		e.mu.Unlock()
		if p != nil {
			s.State = word(p.GetState().GetSessionState().String(), "SESSION_STATE_")
			if s.State == "established" {
				s.Since = p.GetTimers().GetState().GetUptime().AsTime()
				s.Announced, _ = advertised(p)
			}
			if e.cfg.Peers[i].BFD {
				s.BFD = word(p.GetState().GetBfdState().GetSessionState().String(), "BFD_SESSION_STATE_")
			}
		}
		out[i] = s
	}
	return out
}

func word(s, prefix string) string { return strings.ToLower(strings.TrimPrefix(s, prefix)) }

// advertised counts the prefixes a peer was told, and their families.
func advertised(p *api.Peer) (prefixes, families int) {
	for _, f := range p.GetAfiSafis() {
		if n := f.GetState().GetAdvertised(); n > 0 {
			prefixes, families = prefixes+int(n), families+1
		}
	}
	return prefixes, families
}

// mustHaveSent is how many UPDATE messages each peer will have been sent when
// everything has been withdrawn: one a family more than now.
func (e *engine) mustHaveSent() map[int]uint64 {
	sent := make(map[int]uint64)
	for i, p := range e.list() {
		if _, families := advertised(p); families > 0 {
			sent[i] = p.GetState().GetMessages().GetSent().GetUpdate() + uint64(families)
		}
	}
	return sent
}

// waitSent waits until the withdrawal has been written to the sessions. Should
// it be in more messages than thought, the end of the session says the rest.
func (e *engine) waitSent() {
	for end := time.Now().Add(sentWait); time.Now().Before(end); pause() {
		missing := false
		for i, p := range e.list() {
			established := p.GetState().GetSessionState() == api.PeerState_SESSION_STATE_ESTABLISHED
			if established && p.GetState().GetMessages().GetSent().GetUpdate() < e.sent[i] {
				missing = true
			}
		}
		if !missing {
			return
		}
	}
}

// stop ends the sessions and the engine, after what wish(false) withdrew has
// been sent, and returns when its goroutines have ended.
func (e *engine) stop() error {
	if e.srv == nil {
		return nil
	}
	e.waitSent()
	done := make(chan error, 1)
	go e.shut(e.srv, done)
	limit := time.NewTimer(stopWait)
	defer limit.Stop()
	var err error
	select {
	case err = <-done:
	case <-limit.C:
		err = fmt.Errorf("bgp hasn't ended within %s", stopWait)
	}
	e.mu.Lock()
	e.srv = nil
	e.mu.Unlock()
	return err
}

func (e *engine) shut(srv *server.BgpServer, done chan<- error) {
	for i := range e.links {
		if e.links[i].added {
			if err := e.deletePeer(i); err != nil {
				e.log.Debug("bgp peer is left to the end", "peer", e.cfg.Peers[i], "err", err) // Stop deletes it
			}
		}
	}
	srv.Stop()
	done <- e.ended()
}

// labelKey is the profiler's label of an engine's goroutines.
const labelKey = "anytun-announce"

// ended waits until no goroutine of the engine is left: its own Stop doesn't
// wait for those that connect to peers and that pass messages on. Goroutines
// inherit the labels of those that start them, and the profile tells who has
// which.
func (e *engine) ended() error {
	mark := []byte(strconv.Quote(labelKey) + ":" + strconv.Quote(e.label))
	for end := time.Now().Add(stopWait / 2); time.Now().Before(end); pause() {
		var profile bytes.Buffer
		if err := pprof.Lookup("goroutine").WriteTo(&profile, 1); err != nil {
			return fmt.Errorf("list goroutines: %w", err)
		}
		if !bytes.Contains(profile.Bytes(), mark) {
			return nil
		}
	}
	return errors.New("bgp engine has left goroutines behind")
}
