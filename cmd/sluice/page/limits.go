package page

import (
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/sluiceproxy/sluice/authz"
	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

const (
	defaultLimits = 100 // of GET /api/limits
	maxLimits     = 1000
	// maxText is the maximum length of a shown expression in bytes. Longer ones
	// are cut.
	maxText = 500
)

// limitReport is one limit of GET /api/limits, with what it decided since the
// start.
type limitReport struct {
	Name      string        `json:"name"`
	Mode      string        `json:"mode"` // enforce or shadow
	From      string        `json:"from"` // config, or route: Envoy's filter chain
	Rate      string        `json:"rate,omitempty"`
	Burst     int64         `json:"burst,omitempty"`
	Quota     string        `json:"quota,omitempty"`  // instead of a rate and a burst
	Lease     string        `json:"lease,omitempty"`  // such as 200ms
	Leased    *leaseReport  `json:"leased,omitempty"` // with Lease only
	Settle    string        `json:"settle,omitempty"` // as the config writes it
	Within    string        `json:"settle_within,omitempty"`
	Settled   *settleReport `json:"settled,omitempty"` // with Settle only
	Key       []string      `json:"key"`
	Group     string        `json:"group,omitempty"`
	Overrides int           `json:"overrides"`
	Allowed   uint64        `json:"allowed"`
	Limited   uint64        `json:"limited"`
	Tokens    uint64        `json:"tokens"` // that were taken
}

// leaseReport is what a limit leases.
type leaseReport struct {
	Keys  int64 `json:"keys"`  // whose tokens this sidecar has leased now
	Takes int64 `json:"takes"` // how often it leased some
}

// settleReport is what the settlements of a limit corrected.
type settleReport struct {
	Returned   uint64 `json:"returned"`   // tokens
	Surcharged uint64 `json:"surcharged"` // tokens
	Forgiven   uint64 `json:"forgiven"`   // tokens
	Expired    uint64 `json:"expired"`    // requests whose end did not arrive in time
}

// limitList has the limits of a config, in its order and without counts, so that
// a config of 10,000 limits is not described for each request.
type limitList struct {
	config *policy.Config
	limits []limitReport
}

// described returns the limits of the config in force.
func (p *Page) described() *limitList {
	config := p.Config()
	if known := p.limits.Load(); known != nil && known.config == config {
		return known
	}
	list := &limitList{config: config}
	for _, d := range config.Describe() {
		l := limitReport{
			Name: d.Limit.Name, Mode: d.Limit.Mode(), From: "config", Rate: d.Rate, Burst: d.Burst,
			Key: []string{}, Group: d.Group, Overrides: d.Overrides,
		}
		for _, part := range d.Key {
			l.Key = append(l.Key, cut(part))
		}
		if d.Quota != "" {
			l.Quota, l.Burst = d.Quota, 0 // which would be the quota's tokens
		}
		if d.Limit.Lease > 0 {
			l.Lease = policy.DurationText(d.Limit.Lease)
		}
		if d.Settle != "" {
			l.Settle, l.Within = cut(d.Settle), policy.DurationText(d.SettleWithin)
		}
		list.limits = append(list.limits, l)
		if d.Twin != nil { // for the overrides that have the other mode
			l.Mode, l.Overrides = d.Twin.Mode(), 0
			list.limits = append(list.limits, l)
		}
	}
	p.limits.Store(list)
	return list
}

// cut returns the first maxText bytes of an expression.
func cut(text string) string {
	if len(text) <= maxText {
		return text
	}
	return strings.ToValidUTF8(text[:maxText], "") + "…"
}

// limitOrders are the values of the parameter sort of GET /api/limits.
var limitOrders = map[string]func(a, b limitReport) int{
	"file":    nil, // as the limits are
	"name":    func(a, b limitReport) int { return cmp.Compare(a.Name, b.Name) },
	"allowed": func(a, b limitReport) int { return cmp.Compare(b.Allowed, a.Allowed) },
	"denied": func(a, b limitReport) int {
		return cmp.Or(cmp.Compare(b.Limited, a.Limited), cmp.Compare(b.Allowed, a.Allowed))
	},
}

// findLimits returns at most n of the limits that the parameter filter finds, by
// default as they are in the file. If there are more, it returns those that
// denied most.
func (p *Page) findLimits(r *http.Request) (any, error) {
	filter, by, most := strings.ToLower(r.FormValue("filter")), r.FormValue("sort"), defaultLimits
	if n := r.FormValue("n"); n != "" {
		var err error
		if most, err = strconv.Atoi(n); err != nil || most < 1 || most > maxLimits {
			return nil, badRequestError{fmt.Errorf("n=%q: must be a number from 1 to %d", n, maxLimits)}
		}
	}
	if _, ok := limitOrders[by]; !ok && by != "" {
		return nil, badRequestError{fmt.Errorf("sort=%q: must be one of %s", by,
			strings.Join(slices.Sorted(maps.Keys(limitOrders)), ", "))}
	}
	found := p.allLimits()
	if filter != "" {
		found = slices.DeleteFunc(found, func(l limitReport) bool { return !l.matches(filter) })
	}
	total := len(found)
	if by == "" {
		by = "file"
		if total > most {
			by = "denied"
		}
	}
	if order := limitOrders[by]; order != nil {
		slices.SortStableFunc(found, order)
	}
	return struct {
		Total  int           `json:"total"`
		Sort   string        `json:"sort"`
		Limits []limitReport `json:"limits"`
	}{total, by, found[:min(total, most)]}, nil
}

// matches reports whether a filter in lower case is a part of the limit's name,
// group or key.
func (l *limitReport) matches(filter string) bool {
	return strings.Contains(l.Name, filter) || strings.Contains(strings.ToLower(l.Group), filter) ||
		slices.ContainsFunc(l.Key, func(part string) bool { return strings.Contains(strings.ToLower(part), filter) })
}

// allLimits returns the limits of the config in its order, and then those of
// Envoy's routes.
func (p *Page) allLimits() []limitReport {
	type id struct{ name, mode string }
	list := p.described()
	all := make([]limitReport, 0, len(list.limits))
	totals := make(map[id]authz.LimitTotals, len(list.limits))
	var routes []limitReport
	for _, l := range p.Server.Limits() {
		if l.Route {
			routes = append(routes, limitReport{
				Name: l.Name, Mode: l.Mode(), From: "route", Key: []string{},
				Allowed: l.Allowed, Limited: l.Limited, Tokens: l.Taken,
			})
		} else {
			totals[id{l.Name, l.Mode()}] = l
		}
	}
	leases := map[string]limiter.LeaseTotals{}
	if p.Leases != nil {
		leases = p.Leases()
	}
	for _, l := range list.limits {
		t := totals[id{l.Name, l.Mode}]
		l.Allowed, l.Limited, l.Tokens = t.Allowed, t.Limited, t.Taken
		if l.Lease != "" {
			l.Leased = &leaseReport{leases[l.Name].Keys, leases[l.Name].Takes}
		}
		if s := t.Settled; s != nil && l.Settle != "" {
			l.Settled = &settleReport{s.Returned, s.Surcharged, s.Forgiven, s.Expired}
		}
		all = append(all, l)
	}
	return append(all, routes...)
}
