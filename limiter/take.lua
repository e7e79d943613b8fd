#!lua
-- This script draws the costs of each request from its buckets, from all of them
-- or from none, and settles what earlier takes hold. One call carries many
-- requests and settlements, one after another: each sees what those before it
-- left, and a bucket that several use is read once and written once. A last line
-- that calls take is appended.
--
-- The shebang has no flags, so Redis refuses the whole script, before its first
-- line, if it could not write: out of memory, a read-only replica, too few
-- replicas, a failed save.
--
-- KEYS are the buckets of the charges and settlements, in their order. Several
-- requests may name the same bucket; one request names each bucket once. ARGV[1]
-- has one packed charge or settlement after another.
--
-- A charge is one byte of options, the limit's rate (n tokens each p microseconds)
-- and burst, and the cost in tokens. The options say when the other charges of
-- the request are not taken: 0 if this bucket denies or fails, 1 only if it
-- denies, 2 never (a shadow limit, which is taken by itself). They are 4 more for
-- the last charge of a request, and 8 more if the cost is to be held; its life in
-- microseconds follows then. ARGV[2] has 8 random bytes if any cost is to be held.
-- They are 32 more for a quota, whose N is the burst. It has no rate: n is when its
-- window begins, in microseconds since 1970, and p how long it lasts, as the caller's
-- clock guesses. If the bucket is not in that window, nothing of the request is taken.
--
-- A settlement is the option 16, how many tokens are held, what they have cost,
-- and the name of the hold: the birth of the bucket's holds, the number of the
-- slice, and the index in it.
--
-- The reply is one string: the instant (7 bytes), and for each charge in turn 15
-- bytes: flags (1 allowed, 2 taken, 4 the stored state was invalid, 8 the bucket
-- failed), then the tokens before the take, whole (4 bytes, a debt is negative)
-- and p-ths of one (6 bytes; of a quota, how many microseconds its window still
-- lasts), and how much is held after it (4 bytes); or the code of the failure. If
-- the guessed window is wrong, the flags are 16, and an instant (7 bytes) that is
-- in the right one follows. For a charge that holds 18 more: the name of the hold
-- (14 bytes, zeros if there is none), and how many holds ended without a settlement
-- since.
-- For each settlement 15 bytes: flags (1 the hold was known, 2 it was settled
-- before, 4 it came late, 8 the bucket failed), the tokens returned, those taken
-- besides (4 bytes each), and how many holds ended without a settlement since; or
-- the code of the failure.
--
-- All numbers are doubles, exact up to 2^53. Arguments and stored states are
-- checked against these bounds: n <= 1e15 < 2^50, p < 2^45, tokens and burst
-- <= 1e9 < 2^30, now < 2^53. The arithmetic is that of bucket.go, state.go, hold.go
-- and quota.go, line by line.

local MAGIC = '\181\8'
-- Version 1: magic, version, tokens, p-ths of a token, instant in microseconds,
-- burst, n, p. With a key of ordinary length Redis still keeps these 37 bytes in
-- one allocation. Every later version must begin with magic and version, too.
local STATE, STATE_SIZE = '>c2BI4I6I7I4I7I6', 37
-- Version 2 is version 1 followed by another shape (burst, n, p); see state.other
-- in state.go. It is written only if there is such a shape.
local MIXED, MIXED_SIZE = '>c2BI4I6I7I4I7I6I4I7I6', 54
-- Version 3 is version 2 with a level that may be negative (its other shape is 0
-- if there is none), followed by the holds: their birth, the number of the next
-- slice, how many slices there are; and the slices, each with its bits. It is
-- written only if there are slices or a debt.
local HELD, HELD_SIZE = '>c2Bi4I6I7I4I7I6I4I7I6c8I4B', 67
-- Versions 4 and 5 are quotas: the level (which may be negative), the largest N of
-- the window, the instant, when the window begins and ends, when it lapsed (0 if it
-- did not); N, level, begin and end of another calendar's window (0 if there is
-- none). Version 5 has holds besides, as version 3.
local QUOTA, QUOTA_SIZE = '>c2Bi4I4I7I7I7I7I4i4I7I7', 61
local HELD_QUOTA, HELD_QUOTA_SIZE = '>c2Bi4I4I7I7I7I7I4i4I7I7c8I4B', 74
local CHARGE, CHARGE_SIZE = '>BI7I6I4I4', 22
local SETTLEMENT, SETTLEMENT_SIZE = '>BI4I4c8I4I2', 23

local MAX_N, MIN_P, MAX_P, MAX_TOKENS, MAX_TIME = 1e15, 1e6, 31622400000000, 1e9, 2^53
local MIN_LIFE, MAX_LIFE = 1e4, 8.64e10 -- of a hold, in microseconds
local NO_BIRTH, NO_NAME = '\0\0\0\0\0\0\0\0', '\0\0\0\0\0\0\0\0\0\0\0\0\0\0'
-- SLACK is how many milliseconds a bucket is kept after it is full again. Neither
-- rounding nor a lag between the clocks that Redis uses for TIME and for expiry
-- may drop a bucket that is not full.
local SLACK = 5000

-- muldiv returns floor(x*y/d) and the remainder, for x < d. If x*y is below 2^53,
-- plain division is exact: a quotient below an integer k is at least 1/d below it,
-- and a double rounds it up to k only if k*d > 2^53. Otherwise y is split into
-- eight limbs of 7 bits, from the top: r*128 and x*limb are below
-- 2^45 * 2^7 = 2^52 each, so their sum is below 2^53 and its division exact again;
-- q is at most the final quotient, which is below y.
local function muldiv(x, y, d)
  local product = x * y
  if product < 2^53 then
    local q = math.floor(product / d)
    return q, product - q * d
  end
  local q, r, unit = 0, 0, 2^49
  while unit >= 1 do
    local sum = r * 128 + x * (math.floor(y / unit) % 128)
    local digit = math.floor(sum / d)
    q, r = q * 128 + digit, sum - digit * d
    unit = unit / 128
  end
  return q, r
end

-- refill returns the level (tokens, p-ths) after some microseconds: refilled, but
-- to at most so many tokens.
local function refill(tokens, frac, elapsed, most, n, p)
  local room = most - tokens
  if room <= 0 then
    return tokens, frac
  end
  local a = math.floor(elapsed / p)
  if a * n >= room then -- inexact only from 2^53 on, far above any room
    return most, 0
  end
  local q, r = muldiv(elapsed - a * p, n, p)
  local arrived = a * n + q
  frac = frac + r
  if frac >= p then
    frac, arrived = frac - p, arrived + 1
  end
  if arrived >= room then
    return most, 0
  end
  return tokens + arrived, frac
end

local function shape_ok(burst, n, p)
  return burst >= 1 and burst <= MAX_TOKENS and n >= 1 and n <= MAX_N and p >= MIN_P and p <= MAX_P
end

local MAX_FILL = 3155760000000000 -- microseconds: 100 years

-- fill_from returns about how many microseconds a shape takes from so many tokens
-- until it is full.
local function fill_from(tokens, burst, n, p)
  return math.min(math.max(0, burst - tokens) * p / n, MAX_FILL)
end

-- covers reports whether the first shape, from every level that is no debt, is full
-- no earlier than the second.
local function covers(burst, n, p, obst, on, op)
  return obst <= burst and fill_from(0, obst, on, op) <= fill_from(0, burst, n, p)
end

-- other_than returns the other shape (burst, n, p; or nil) to store when the shape
-- of burst, n and p uses a bucket that is not full in the old shape, or not in
-- the other one, which may be nil. See otherThan in state.go.
local function other_than(old_burst, old_n, old_p, obst, on, op, burst, n, p)
  if not obst or covers(old_burst, old_n, old_p, obst, on, op) then
    obst, on, op = old_burst, old_n, old_p
  elseif not covers(obst, on, op, old_burst, old_n, old_p) then
    if not (on / op < old_n / old_p) then
      on, op = old_n, old_p
    end
    obst = math.max(obst, old_burst)
  end
  if covers(burst, n, p, obst, on, op) then
    return nil
  end
  return obst, on, op
end

-- holding returns the functions for buckets with holds; see hold.go. Redis makes
-- all functions of a script anew in each call, so these are made only if a bucket
-- needs them.
local function holding()
  local lib = {}
  -- A slice: number, end, life, left, count, open, expired (0 or 1).
  local SLICE, SLICE_SIZE = '>I4I7I5I4I2I2B', 25
  local SLICE_PARTS, MAX_SLICES, MAX_SLICE_HOLDS = 12, 64, 8192

  -- load decodes the slices of a state of version 3 or 5, which begin after so many
  -- bytes. It returns nil if they are invalid.
  function lib.load(raw, size, birth, next, count)
    local h = { birth = birth, next = next, total = 0 }
    local pos = size + 1
    if count > MAX_SLICES then
      return nil
    end
    for i = 1, count do
      if pos + SLICE_SIZE > #raw + 1 then
        return nil
      end
      local number, ends, life, left, count, open, expired, after = struct.unpack(SLICE, raw, pos)
      pos = after + math.ceil(count / 8)
      if pos > #raw + 1 or number >= next or ends >= MAX_TIME or life > MAX_LIFE + MAX_LIFE / SLICE_PARTS or
          count > MAX_SLICE_HOLDS or open > count or expired == 1 and open > 0 or open == 0 and left > 0 then
        return nil
      end
      h[i] = { number = number, ends = ends, life = life, left = left, count = count, open = open,
        expired = expired == 1, settled = string.sub(raw, after, pos - 1) } -- made at once, as a table grows slowly
      h.total = h.total + left
    end
    return pos == #raw + 1 and h or nil
  end

  -- ends returns when the last open hold ends, and until when a settlement may still
  -- change the bucket; 0 if no hold is open, or none can be settled.
  function lib.ends(h)
    local ended, settleable = 0, 0
    for i = 1, #h do
      if h[i].open > 0 then
        ended = math.max(ended, h[i].ends)
      end
      if h[i].open > 0 or h[i].expired then
        settleable = math.max(settleable, h[i].ends + h[i].life)
      end
    end
    return ended, settleable
  end

  -- is_over reports whether a slice has ended, and nothing of it can be settled.
  local function is_over(e, now)
    return e.open == 0 and e.ends <= now and not (e.expired and e.ends + e.life > now)
  end

  -- keep drops the slices for which a function is false.
  local function keep(h, wanted)
    local kept = 0
    for i = 1, #h do
      local e = h[i]
      h[i] = nil
      if wanted(e) then
        kept = kept + 1
        h[kept] = e
      end
    end
  end

  local function by_end(a, b)
    return a.ends < b.ends or a.ends == b.ends and a.number < b.number
  end

  -- finish ends the holds whose time has come, and forgets slices. It returns the
  -- level and its instant then, how many holds ended, and whether anything changed.
  function lib.finish(h, tokens, frac, at, burst, n, p, now, back)
    if back then
      for i = 1, #h do
        h[i].ends = math.min(h[i].ends, now + h[i].life)
      end
      table.sort(h, by_end)
    end
    local expired, changed, over = 0, false, false
    for i = 1, #h do
      local e = h[i]
      if e.open > 0 and e.ends <= now then
        if e.ends > at then
          tokens, frac = refill(tokens, frac, e.ends - at, burst - h.total, n, p)
          at = e.ends
        end
        expired, h.total, changed = expired + e.open, h.total - e.left, true
        e.open, e.left, e.expired = 0, 0, true
      end
      over = over or is_over(e, now)
    end
    if over then
      keep(h, function(e) return not is_over(e, now) end)
    end
    return tokens, frac, at, expired, changed or over
  end

  -- end_all ends all holds, and returns how many were open.
  function lib.end_all(h)
    local expired = 0
    for i = 1, #h do
      local e = h[i]
      if e.open > 0 then
        expired = expired + e.open
        e.open, e.left, e.expired = 0, 0, true
      end
    end
    h.total = 0
    return expired
  end

  -- insert adds an empty slice and returns its index, or nil if there is no room.
  local function insert(h, ending)
    if h.next == 2^32 - 1 then
      return nil
    end
    keep(h, function(e) return e.open > 0 or e.expired end)
    if #h == MAX_SLICES then
      local oldest
      for i = MAX_SLICES, 1, -1 do
        oldest = h[i].expired and i or oldest
      end
      if not oldest then
        return nil
      end
      table.remove(h, oldest)
    end
    local i = #h + 1
    while i > 1 and h[i - 1].ends > ending do
      i = i - 1
    end
    table.insert(h, i,
      { number = h.next, ends = ending, life = 0, left = 0, count = 0, open = 0, expired = false, settled = '' })
    h.next = h.next + 1
    return i
  end

  -- hold holds some tokens, which the caller takes from the level, and returns the
  -- number of the slice and the index in it; nil if there is no room.
  function lib.hold(h, cost, life, now)
    local part = math.floor(life / SLICE_PARTS)
    local ending = math.floor((now + life + part - 1) / part) * part
    local i = #h
    while i > 0 and h[i].ends > ending do
      i = i - 1
    end
    if i == 0 or h[i].ends ~= ending or h[i].expired or h[i].count == MAX_SLICE_HOLDS then
      i = insert(h, ending)
      if not i then
        return nil
      end
    end
    local e = h[i]
    local index = e.count
    e.life = math.max(e.life, life + part)
    if index % 8 == 0 then
      e.settled = e.settled .. '\0'
    end
    e.count, e.open, e.left, h.total = index + 1, e.open + 1, e.left + cost, h.total + cost
    return e.number, index
  end

  -- settle ends a hold of so many tokens, which has cost some. It returns the new
  -- level, and for the reply flags, the tokens returned, and those taken besides.
  function lib.settle(h, tokens, frac, burst, held, cost, birth, number, index)
    if not h or h.birth ~= birth then
      return tokens, frac, 0, 0, 0
    end
    local e
    for i = 1, #h do
      if h[i].number == number then
        e = h[i]
      end
    end
    if not e then -- all of its holds have been settled, or its time is over
      return tokens, frac, number < h.next and 3 or 0, 0, 0
    elseif index >= e.count then
      return tokens, frac, 0, 0, 0
    end
    local at, bit = math.floor(index / 8) + 1, 2 ^ (index % 8)
    local byte = string.byte(e.settled, at)
    if math.floor(byte / bit) % 2 == 1 then
      return tokens, frac, 3, 0, 0
    end
    e.settled = string.sub(e.settled, 1, at - 1) .. string.char(byte + bit) .. string.sub(e.settled, at + 1)
    local flags, freed = e.expired and 5 or 1, math.min(held, e.left)
    if not e.expired then
      e.open = e.open - 1
      if e.open == 0 then
        freed = e.left
      end
    end
    e.left, h.total = e.left - freed, h.total - freed
    local back, more, returned, surcharged = math.min(freed, held) - cost, cost - held, 0, 0
    if back > 0 then
      returned = math.max(0, math.min(back, burst - h.total - tokens))
      tokens = tokens + returned
      if tokens + h.total >= burst then
        frac = 0
      end
    end
    if more > 0 then
      surcharged = math.max(0, math.min(more, tokens + burst))
      tokens = tokens - surcharged
    end
    return tokens, frac, flags, returned, surcharged
  end

  -- pack returns the packed slices.
  function lib.pack(h)
    local slices = {}
    for i = 1, #h do
      local e = h[i]
      slices[i] = struct.pack(SLICE, e.number, e.ends, e.life, e.left, e.count, e.open, e.expired and 1 or 0) .. e.settled
    end
    return table.concat(slices)
  end

  return lib
end

local lib -- what holding returned

-- quotas returns the functions for quotas; see quota.go. A quota is a table: begins
-- and ends are its window, most the largest N of it, lapsed is nil or when the window
-- lapsed, and other is nil or the window of another calendar, with its level.
local function quotas()
  local Q = {}

  -- load decodes a state of version 4 or 5, and returns the level, the quota, whether
  -- it must be stored even if nothing is taken, the holds, and how many of them ended.
  -- It returns nil if the state is invalid.
  function Q.load(raw, version, now)
    local level, at, lapsed, birth, next, count, h
    local q, o, _ = {}, {}, nil
    if version == 4 then
      _, _, level, q.most, at, q.begins, q.ends, lapsed, o.most, o.level, o.begins, o.ends = struct.unpack(QUOTA, raw)
    else
      _, _, level, q.most, at, q.begins, q.ends, lapsed, o.most, o.level, o.begins, o.ends, birth, next, count =
        struct.unpack(HELD_QUOTA, raw)
      lib = lib or holding()
      h = lib.load(raw, HELD_QUOTA_SIZE, birth, next, count)
      if not h or h.total > MAX_TOKENS then
        return nil
      end
    end
    if q.most < 1 or q.most > MAX_TOKENS or level > q.most or level < -MAX_TOKENS or at >= MAX_TIME or
        q.ends >= MAX_TIME or q.begins >= q.ends or lapsed >= MAX_TIME or
        o.most > 0 and (o.most > MAX_TOKENS or o.level > o.most or o.level < -MAX_TOKENS or o.ends >= MAX_TIME or
        o.begins >= o.ends) then
      return nil
    end
    q.lapsed = lapsed > 0 and lapsed or nil
    q.other = o.most > 0 and o or nil
    local expired, moved, back = 0, false, now < at
    if h and #h > 0 then
      _, _, _, expired, moved = lib.finish(h, 0, 0, now, 0, 1, 1, now, back)
      moved = moved or back
    end
    return level, q, moved, h and #h > 0 and h or nil, expired
  end

  -- reached returns the earliest instant that a take can count at.
  function Q.reached(q)
    return q.lapsed and q.ends or q.begins
  end

  local function debt_until(q)
    return math.max(q.ends, q.lapsed or 0)
  end

  -- enter brings a quota with a level and holds into a window that an instant is in.
  -- It returns the level and the quota, whether that must be stored even if nothing is
  -- taken, and how many holds ended.
  function Q.enter(q, level, h, burst, begins, ends, at)
    local moved, expired = false, 0
    if q.begins ~= begins or q.ends ~= ends or q.lapsed then
      moved = true
      if h then
        expired = lib.end_all(h)
      end
      local o, debt = q.other, 0
      if begins <= debt_until(q) then
        debt = math.max(0, -level)
      end
      local ended = q.lapsed or q.ends <= at
      local new = { begins = begins, ends = ends, most = burst }
      local left = burst
      local back = o and o.begins == begins and o.ends == ends
      if back then
        new.most, left = o.most, o.level
      end
      left = math.max(left - math.min(debt, new.most), -new.most)
      if not ended then
        new.other = { begins = q.begins, ends = q.ends, most = q.most, level = level + debt }
      elseif o and not back and o.ends > at then
        new.other = o
      end
      q, level = new, left
    end
    if burst > q.most then
      level, q.most, moved = level + burst - q.most, burst, true
    end
    return level, q, moved, expired
  end

  -- left returns the level as one of a quota of another N, and how many microseconds
  -- the window still lasts.
  function Q.left(q, level, burst, now)
    return math.max(level + burst - q.most, math.min(0, level)), math.min(math.max(0, q.ends - now), 2^48 - 1)
  end

  -- lapse brings a quota with holds to the instant of a settlement. It returns the
  -- level, whether anything changed, and how many holds ended.
  function Q.lapse(q, level, h, now)
    if not (q.lapsed or q.ends <= math.max(now, q.begins)) then
      return level, false, 0
    end
    local before = debt_until(q)
    q.lapsed = math.max(now, before)
    level = math.min(0, level)
    if q.lapsed - before >= q.ends - q.begins then
      level = 0
    end
    return level, true, lib.end_all(h)
  end

  -- pack returns the state, and until when it must be kept.
  function Q.pack(q, level, h, now)
    local o, keep = q.other, q.lapsed and 0 or q.ends
    local omost, olevel, obegins, oends = 0, 0, 0, 0
    if o then
      omost, olevel, obegins, oends = o.most, o.level, o.begins, o.ends
    end
    keep = math.max(keep, oends)
    if level < 0 then
      keep = math.max(keep, debt_until(q) + 2 * (q.ends - q.begins))
    end
    if not h then
      return struct.pack(QUOTA, MAGIC, 4, level, q.most, now, q.begins, q.ends, q.lapsed or 0,
        omost, olevel, obegins, oends), keep
    end
    local _, settleable = lib.ends(h)
    return struct.pack(HELD_QUOTA, MAGIC, 5, level, q.most, now, q.begins, q.ends, q.lapsed or 0,
      omost, olevel, obegins, oends, h.birth, h.next, #h) .. lib.pack(h), math.max(keep, settleable)
  end

  return Q
end

local Q -- what quotas returned

-- load decodes a stored state, and returns what the bucket has now in the shape
-- that it was stored with: tokens, p-ths, burst, n, p; whether that must be stored
-- even if nothing is taken; the other shape, or nil if there is none or the bucket
-- is full in both; the holds, or nil if there are none; and how many of them ended
-- without a settlement; and the quota, or nil if it is none. If it cannot decode the
-- state it returns nil, and whether that is because its version is newer. An invalid
-- state counts as an empty bucket from now on. See next in state.go.
local function load(raw, now)
  if #raw < 3 or string.sub(raw, 1, 2) ~= MAGIC then
    return nil, false
  end
  local version = string.byte(raw, 3)
  local _, tokens, frac, at, burst, n, p, obst, on, op, h
  local lowest = 0
  if version == 1 and #raw == STATE_SIZE then
    _, _, tokens, frac, at, burst, n, p = struct.unpack(STATE, raw)
  elseif version == 2 and #raw == MIXED_SIZE then
    _, _, tokens, frac, at, burst, n, p, obst, on, op = struct.unpack(MIXED, raw)
  elseif version == 3 and #raw >= HELD_SIZE then
    local birth, next, count
    _, _, tokens, frac, at, burst, n, p, obst, on, op, birth, next, count = struct.unpack(HELD, raw)
    if obst == 0 then
      obst = nil
    end
    lib = lib or holding()
    lowest, h = -MAX_TOKENS, lib.load(raw, HELD_SIZE, birth, next, count)
    if not h or h.total > MAX_TOKENS then
      return nil, false
    elseif #h == 0 then
      h = nil
    end
  elseif version == 4 and #raw == QUOTA_SIZE or version == 5 and #raw >= HELD_QUOTA_SIZE then
    Q = Q or quotas()
    local level, q, moved, held, expired = Q.load(raw, version, now)
    if not level then
      return nil, false
    end
    return level, 0, nil, nil, nil, moved, nil, nil, nil, held, expired, q
  else
    return nil, version >= 2
  end
  if not (shape_ok(burst, n, p) and (not obst or shape_ok(obst, on, op)) and tokens >= lowest and tokens <= burst and
      frac < p and at < MAX_TIME and (tokens < burst or frac == 0)) then
    return nil, false
  end
  local elapsed, back = math.max(0, now - at), now < at
  local due = obst and math.ceil(fill_from(tokens, obst, on, op))
  if due and h then
    due = due + math.max(0, lib.ends(h) - at)
  end
  if back then
    at = now
  end
  local moved, held, expired = back, 0, 0
  if h then
    tokens, frac, at, expired, moved = lib.finish(h, tokens, frac, at, burst, n, p, now, back)
    moved, held = moved or back, h.total
    if #h == 0 then
      h = nil
    end
  end
  tokens, frac = refill(tokens, frac, now - at, burst - held, n, p)
  if due and tokens == burst and (elapsed >= due or obst <= burst) then
    obst = nil
  end
  return tokens, frac, burst, n, p, moved, obst, on, op, h, expired
end

-- convert returns a level of the period old_p as one of another shape: at most so
-- many tokens, and rounded down.
local function convert(tokens, frac, old_p, most, p)
  if tokens >= most then
    return most, 0
  end
  frac = muldiv(frac, p, old_p)
  return tokens, frac
end

-- code returns the first word of an error of Redis. The error for a command that
-- the user must not run in a script has no such word.
local function code(err)
  if string.find(err, 'ACL failure in script', 1, true) or string.find(err, 'The user executing the script', 1, true) then
    return 'NOPERM'
  end
  return string.sub(string.match(err, '^%S*'), 1, 10)
end

-- set writes a value that must be kept for some milliseconds, and returns the
-- answer.
local function set(key, value, full)
  local ttl = full + SLACK
  -- '%d' is quicker than '%.0f', but holds only a C long, of 32 bits on some machines.
  return redis.pcall('SET', key, value, 'PX', string.format(ttl < 2^31 and '%d' or '%.0f', ttl))
end

-- store writes a bucket by one SET, with its value and its expiry, and returns the
-- answer. obst is nil if there is no other shape, and h if there are no holds.
local function store(key, tokens, frac, now, burst, n, p, obst, on, op, h)
  -- The rounding error of this double is far below SLACK.
  local full = math.min(math.ceil(((burst - tokens) * p - frac) / n / 1000), MAX_FILL / 500)
  if obst then
    full = math.max(full, math.ceil(fill_from(tokens, obst, on, op) / 1000))
  end
  local value
  if h or tokens < 0 then
    local birth, next, count, slices = NO_BIRTH, 0, 0, ''
    if h then
      local ended, settleable = lib.ends(h)
      full = math.max(full + math.ceil(math.max(0, ended - now) / 1000), math.ceil((settleable - now) / 1000))
      birth, next, count, slices = h.birth, h.next, #h, lib.pack(h)
    end
    value = struct.pack(HELD, MAGIC, 3, tokens, frac, now, burst, n, p, obst or 0, on or 0, op or 0,
      birth, next, count) .. slices
  elseif obst then
    value = struct.pack(MIXED, MAGIC, 2, tokens, frac, now, burst, n, p, obst, on, op)
  else
    value = struct.pack(STATE, MAGIC, 1, tokens, frac, now, burst, n, p)
  end
  return set(key, value, full)
end

-- list returns an empty table with room for the entries of four charges or buckets:
-- one without is allocated anew for its first entry, its second and its third.
local function list()
  return { nil, nil, nil, nil }
end

local function take(now)
  -- Check every argument before anything is read.
  local count, packed, birth = #KEYS, ARGV[1], ARGV[2]
  if count < 1 or #ARGV < 1 or #ARGV > 2 or birth and (#birth ~= 8 or birth == NO_BIRTH) then
    return redis.error_reply('SLUICE at least one key, the packed charges, and 8 random bytes')
  end
  local options, ns, ps, bursts, costs = list(), list(), list(), list(), list()
  local lives, settlements -- tables, if any charge holds, and if there are any settlements
  local windows -- a table, if there are any quotas: when the guessed window of each ends
  local pos, size, last = 1, #packed, true
  for i = 1, count do
    if pos + CHARGE_SIZE > size + 1 then
      return redis.error_reply('SLUICE a packed charge or settlement for each key')
    end
    local option, n, p, burst, cost, next = struct.unpack(CHARGE, packed, pos)
    if option == 16 then
      if not last or pos + SETTLEMENT_SIZE > size + 1 then
        return redis.error_reply('SLUICE a settlement amid a request, or cut off')
      end
      settlements = settlements or list()
      settlements[i], next = pos, pos + SETTLEMENT_SIZE
    elseif option < 32 and not shape_ok(burst, n, p) or option % 4 > 2 or option % 32 > 14 or option > 46 then
      return redis.error_reply('SLUICE an argument is out of range')
    else
      if option >= 32 then
        if burst < 1 or burst > MAX_TOKENS or p < 1 or n + p >= MAX_TIME then
          return redis.error_reply('SLUICE an argument is out of range')
        end
        windows = windows or {}
        option, windows[i] = option - 32, n + p
      end
      if option >= 8 then
        option = option - 8
        if not birth or next + 5 > size + 1 then
          return redis.error_reply('SLUICE a hold without a life, or without random bytes')
        end
        lives = lives or list()
        lives[i], next = struct.unpack('>I5', packed, next)
        if lives[i] < MIN_LIFE or lives[i] > MAX_LIFE then
          return redis.error_reply('SLUICE an argument is out of range')
        end
      end
      ns[i], ps[i], bursts[i], costs[i], last = n, p, burst, cost, option >= 4
    end
    options[i], pos = option, next
  end
  if not last or pos ~= size + 1 then
    return redis.error_reply('SLUICE the last request has no end')
  end

  -- Read all buckets before anything is written: of[i] is charge i's.
  local of, seen = list(), {}
  local names, tokens, fracs, was_burst, was_n, was_p = list(), list(), list(), list(), list(), list()
  local absent, changed, failed, invalid = list(), list(), {}, {}
  local obst, on, op = {}, {}, {} -- the other shapes
  local holds, expired -- tables, if any bucket has holds
  local quota -- a table, if any bucket is a quota
  local buckets = 0
  for i = 1, count do
    local key = KEYS[i]
    local b = seen[key]
    if not b then
      b = buckets + 1
      buckets, seen[key], names[b] = b, b, key
      local raw = redis.pcall('GET', key)
      if not raw then
        absent[b] = true
      elseif type(raw) == 'string' then
        local level, frac, burst, n, p, moved, other, other_n, other_p, h, ended, q = load(raw, now)
        if level then
          tokens[b], fracs[b], was_burst[b], was_n[b], was_p[b], changed[b] = level, frac, burst, n, p, moved
          if other then
            obst[b], on[b], op[b] = other, other_n, other_p
          end
          if h or ended > 0 then
            holds, expired = holds or {}, expired or {}
            holds[b], expired[b] = h, ended
          end
          if q then
            quota = quota or {}
            quota[b], was_burst[b] = q, q.most
          end
        elseif frac then
          failed[b] = 'NEWER'
        else
          invalid[b] = true
        end
      elseif string.sub(raw.err, 1, 9) == 'WRONGTYPE' then
        invalid[b] = true
      else
        failed[b] = code(raw.err)
      end
    end
    of[i] = b
  end

  -- Decide, request by request. A denied take does not store the level that it
  -- found, or the rounding would add up, unless the clock went back, the shape
  -- changed or holds ended: the bucket would then stand still, or refill at its
  -- old rate.
  local flags, level, parts = list(), list(), list()
  local names_of, held_after, returned, surcharged -- tables, if any bucket has holds
  if lives or settlements or holds then
    lib, lives, settlements = lib or holding(), lives or {}, settlements or {}
    holds, expired = holds or list(), expired or list()
    names_of, held_after, returned, surcharged = list(), list(), list(), list()
  end
  if windows or quota then
    Q, windows, quota = Q or quotas(), windows or {}, quota or {}
  end
  local first, all, wrong = 1, true, false
  for i = 1, count do
    local b, option = of[i], options[i]
    local flag, judged = 0, false
    if holds and settlements[i] then
      returned[i], surcharged[i] = 0, 0
      if not failed[b] and not absent[b] and not invalid[b] then
        local _, held, cost, of_birth, number, index = struct.unpack(SETTLEMENT, packed, settlements[i])
        if quota and quota[b] and holds[b] then
          local lapsed, ended
          tokens[b], lapsed, ended = Q.lapse(quota[b], tokens[b], holds[b], now)
          changed[b], expired[b] = changed[b] or lapsed, (expired[b] or 0) + ended
        end
        tokens[b], fracs[b], flag, returned[i], surcharged[i] =
          lib.settle(holds[b], tokens[b], fracs[b], was_burst[b], held, cost, of_birth, number, index)
        if flag == 1 or flag == 5 then
          changed[b] = true
          if obst[b] and returned[i] > 0 and tokens[b] == was_burst[b] and obst[b] <= was_burst[b] then
            obst[b] = nil -- as in load
          end
        end
      end
    elseif failed[b] then
      all = all and option % 4 ~= 0
    elseif quota and windows[i] then
      local burst, begins, ends, q = bursts[i], ns[i], windows[i], quota[b]
      local at = q and math.max(now, Q.reached(q)) or now
      if at < begins or at >= ends then
        flag, level[i], wrong = 16, at, true
      else
        if not q and (invalid[b] or not absent[b]) then -- no quota's state
          tokens[b], fracs[b], changed[b], flag, invalid[b] = 0, 0, true, 4, nil
          obst[b] = nil
          if holds then
            holds[b] = nil
          end
          q = { begins = begins, ends = ends, most = burst }
        elseif absent[b] then
          tokens[b], fracs[b] = burst, 0
          q = { begins = begins, ends = ends, most = burst }
        else
          local moved, ended
          tokens[b], q, moved, ended = Q.enter(q, tokens[b], holds and holds[b], burst, begins, ends, at)
          changed[b] = changed[b] or moved
          if ended > 0 then
            expired[b] = (expired[b] or 0) + ended
          end
        end
        quota[b], was_burst[b], judged = q, q.most, true
        level[i], parts[i] = Q.left(q, tokens[b], burst, now)
      end
    else
      local n, p, burst = ns[i], ps[i], bursts[i]
      if quota and quota[b] then -- no state of a bucket with a rate
        invalid[b], quota[b] = not absent[b], nil
        if holds then
          holds[b] = nil
        end
      end
      if invalid[b] then
        tokens[b], fracs[b], was_burst[b], was_n[b], was_p[b], changed[b] = 0, 0, burst, n, p, true
        flag, invalid[b] = 4, nil
      elseif absent[b] then -- full, whatever its shape
        tokens[b], fracs[b], was_burst[b], was_n[b], was_p[b] = burst, 0, burst, n, p
      elseif was_p[b] ~= p or was_n[b] ~= n or was_burst[b] ~= burst then
        if obst[b] or tokens[b] < was_burst[b] then
          obst[b], on[b], op[b] = other_than(was_burst[b], was_n[b], was_p[b], obst[b], on[b], op[b], burst, n, p)
        end
        local most = holds and holds[b] and math.max(0, burst - holds[b].total) or burst
        tokens[b], fracs[b] = convert(tokens[b], fracs[b], was_p[b], most, p)
        was_burst[b], was_n[b], was_p[b], changed[b] = burst, n, p, true
      end
      level[i], parts[i], judged = tokens[b], fracs[b], true
    end
    if judged then
      if level[i] >= costs[i] then
        flag = flag + 1
      elseif option % 4 ~= 2 then
        all = false
      end
    end
    flags[i] = flag
    if option >= 4 and option < 16 then -- the request's last: all of its verdicts are known
      for j = first, i do
        if flags[j] % 2 == 1 and not wrong and (all or options[j] % 4 == 2) then
          flags[j] = flags[j] + 2
          b = of[j]
          if holds and lives[j] then
            holds[b] = holds[b] or { birth = birth, next = 0, total = 0 }
            local number, index = lib.hold(holds[b], costs[j], lives[j], now)
            if number then
              names_of[j] = struct.pack('>c8I4I2', holds[b].birth, number, index)
            elseif #holds[b] == 0 then
              holds[b] = nil
            end
          end
          if costs[j] > 0 or holds and lives[j] then
            tokens[b], changed[b], absent[b] = tokens[b] - costs[j], true, nil
          end
        end
        if holds then
          held_after[j] = holds[of[j]] and holds[of[j]].total or 0
        end
      end
      first, all, wrong = i + 1, true, false
    elseif holds and settlements[i] then
      first = i + 1
    end
  end

  for b = 1, buckets do
    if changed[b] then
      local q, done = quota and quota[b], nil
      if q then
        local value, keep = Q.pack(q, tokens[b], holds and holds[b], now)
        done = set(names[b], value, math.ceil(math.max(0, keep - now) / 1000))
      else
        done = store(names[b], tokens[b], fracs[b], now, was_burst[b], was_n[b], was_p[b], obst[b], on[b], op[b],
          holds and holds[b])
      end
      if done.err then -- the buckets before it stay charged: tokens are lost, never granted twice
        failed[b] = code(done.err)
      end
    end
  end

  local reply = list()
  for i = 1, count do
    local b = of[i]
    local why = failed[b]
    if why then
      reply[i] = struct.pack('>Bc14', 8, string.sub(why .. '              ', 1, 14))
    elseif holds and settlements[i] then
      reply[i] = struct.pack('>BI4I4I6', flags[i], returned[i], surcharged[i], expired[b] or 0)
      expired[b] = 0
    elseif flags[i] == 16 then
      reply[i] = struct.pack('>BI7c7', 16, level[i], NO_NAME)
    else
      reply[i] = struct.pack('>Bi4I6I4', flags[i], level[i], parts[i], holds and held_after[i] or 0)
    end
    if holds and lives[i] then
      reply[i] = reply[i] .. (names_of[i] or NO_NAME) .. struct.pack('>I4', expired[b] or 0)
      expired[b] = 0
    end
  end
  return struct.pack('>I7', now) .. table.concat(reply)
end

