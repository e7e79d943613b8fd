#!lua
-- This script has two functions, take and refund; a last line that calls one of
-- them is appended.
--
-- take draws the costs of each request from its buckets, from all of them or from
-- none. One call carries the takes of many requests, one after another: each sees
-- what those before it left, and a bucket that several draw from is read once and
-- written once.
--
-- The shebang has no flags, so Redis refuses the whole script, before its first
-- line, if it could not write: out of memory, a read-only replica, too few
-- replicas, a failed save.
--
-- KEYS are the buckets of the charges, request by request. Several requests may
-- name the same bucket; one request names each bucket once. ARGV[1] has one packed
-- charge after another: the limit's rate (n tokens each p microseconds) and burst,
-- the cost in tokens, and one byte, hold. It says when the other charges of the
-- request are not taken: 0 if this bucket denies or fails, 1 only if it denies, 2
-- never (a shadow limit, which is taken by itself). It is 4 more for the last
-- charge of a request.
--
-- The reply is one string: the instant (7 bytes), and for each charge in turn 11
-- bytes: flags (1 allowed, 2 taken, 4 the stored state was invalid, 8 the bucket
-- failed), then the tokens before the take, whole (4 bytes) and p-ths of one (6
-- bytes), or the first ten bytes of the code of the failure.
--
-- All numbers are doubles, exact up to 2^53. Arguments and stored states are
-- checked against these bounds: n <= 1e15 < 2^50, p < 2^45, tokens and burst
-- <= 1e9 < 2^30, now < 2^53. The arithmetic is that of bucket.go, line by line.

local MAGIC = '\181\8'
-- Version 1: magic, version, tokens, p-ths of a token, instant in microseconds,
-- burst, n, p. With a key of ordinary length Redis still keeps these 37 bytes in
-- one allocation. Every later version must begin with magic and version, too.
local STATE, STATE_SIZE = '>c2BI4I6I7I4I7I6', 37
-- Version 2 is version 1 followed by another shape (burst, n, p); see state.other
-- in bucket.go. It is written only if there is such a shape.
local MIXED, MIXED_SIZE = '>c2BI4I6I7I4I7I6I4I7I6', 54
local CHARGE, CHARGE_SIZE = '>I7I6I4I4B', 22
-- A refund is a charge with the instant of its take in the place of hold.
local REFUND, REFUND_SIZE = '>I7I6I4I4I7', 28

local MAX_N, MIN_P, MAX_P, MAX_TOKENS, MAX_TIME = 1e15, 1e6, 31622400000000, 1e9, 2^53
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

-- refill returns the level (tokens, p-ths) after some microseconds.
local function refill(tokens, frac, elapsed, burst, n, p)
  local room = burst - tokens
  local a = math.floor(elapsed / p)
  if a * n >= room then -- inexact only from 2^53 on, far above any room
    return burst, 0
  end
  local q, r = muldiv(elapsed - a * p, n, p)
  local arrived = a * n + q
  frac = frac + r
  if frac >= p then
    frac, arrived = frac - p, arrived + 1
  end
  if arrived >= room then
    return burst, 0
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

-- covers reports whether the first shape, from every level, is full no earlier
-- than the second.
local function covers(burst, n, p, obst, on, op)
  return obst <= burst and fill_from(0, obst, on, op) <= fill_from(0, burst, n, p)
end

-- other_for returns the other shape (burst, n, p; or nil) to store when the shape
-- of burst, n and p uses a bucket that another shape used, and that is not full in
-- all of them. See otherFor in bucket.go.
local function other_for(old_burst, old_n, old_p, obst, on, op, burst, n, p)
  if old_burst ~= burst or old_n ~= n or old_p ~= p then
    if not obst or covers(old_burst, old_n, old_p, obst, on, op) then
      obst, on, op = old_burst, old_n, old_p
    elseif not covers(obst, on, op, old_burst, old_n, old_p) then
      if not (on / op < old_n / old_p) then
        on, op = old_n, old_p
      end
      obst = math.max(obst, old_burst)
    end
  end
  if not obst or covers(burst, n, p, obst, on, op) then
    return nil
  end
  return obst, on, op
end

-- load decodes a stored state, and returns what the bucket holds now in the shape
-- that it was stored with: tokens, p-ths, burst, n, p; whether that must be stored
-- even if nothing is taken, because the clock went back; and the other shape, if
-- there is one and the bucket is not full in both. If it cannot decode the state
-- it returns nil, and whether that is because its version is newer. An invalid
-- state counts as an empty bucket from now on.
local function load(raw, now)
  if #raw < 3 or string.sub(raw, 1, 2) ~= MAGIC then
    return nil, false
  end
  local version = string.byte(raw, 3)
  local _, tokens, frac, at, burst, n, p, obst, on, op
  if version == 1 and #raw == STATE_SIZE then
    _, _, tokens, frac, at, burst, n, p = struct.unpack(STATE, raw)
  elseif version == 2 and #raw == MIXED_SIZE then
    _, _, tokens, frac, at, burst, n, p, obst, on, op = struct.unpack(MIXED, raw)
    if not shape_ok(obst, on, op) then
      return nil, false
    end
  else
    return nil, version >= 2
  end
  if not (shape_ok(burst, n, p) and tokens <= burst and frac < p and at < MAX_TIME and (tokens < burst or frac == 0)) then
    return nil, false
  end
  local elapsed = math.max(0, now - at)
  local due = obst and math.ceil(fill_from(tokens, obst, on, op))
  tokens, frac = refill(tokens, frac, elapsed, burst, n, p)
  if due and tokens == burst and elapsed >= due then
    obst = nil
  end
  return tokens, frac, burst, n, p, now < at, obst, on, op
end

-- convert returns a level of the period old_p as one of another shape: at most its
-- burst, and rounded down.
local function convert(tokens, frac, old_p, burst, p)
  if tokens >= burst then
    return burst, 0
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

-- store writes a bucket by one SET, with its value and its expiry, and returns the
-- answer. obst is nil if there is no other shape.
local function store(key, tokens, frac, now, burst, n, p, obst, on, op)
  -- The rounding error of this double is far below SLACK.
  local full = math.ceil(((burst - tokens) * p - frac) / n / 1000)
  local value
  if obst then
    full = math.max(full, math.ceil(fill_from(tokens, obst, on, op) / 1000))
    value = struct.pack(MIXED, MAGIC, 2, tokens, frac, now, burst, n, p, obst, on, op)
  else
    value = struct.pack(STATE, MAGIC, 1, tokens, frac, now, burst, n, p)
  end
  local ttl = full + SLACK
  -- '%d' is quicker than '%.0f', but holds only a C long, of 32 bits on some machines.
  return redis.pcall('SET', key, value, 'PX', string.format(ttl < 2^31 and '%d' or '%.0f', ttl))
end

local function take(now)
  -- Check every argument before anything is read.
  local count, packed = #KEYS, ARGV[1]
  if count < 1 or #ARGV ~= 1 or #packed ~= count * CHARGE_SIZE then
    return redis.error_reply('SLUICE one argument of ' .. CHARGE_SIZE .. ' bytes for each key, and at least one key')
  end
  local ns, ps, bursts, costs, holds = {}, {}, {}, {}, {}
  for i = 1, count do
    local n, p, burst, cost, hold = struct.unpack(CHARGE, packed, (i - 1) * CHARGE_SIZE + 1)
    if not shape_ok(burst, n, p) or hold % 4 > 2 or hold > 6 then
      return redis.error_reply('SLUICE an argument is out of range')
    end
    ns[i], ps[i], bursts[i], costs[i], holds[i] = n, p, burst, cost, hold
  end
  if holds[count] < 4 then
    return redis.error_reply('SLUICE the last request has no end')
  end

  -- Read all buckets before anything is written: of[i] is charge i's.
  local of, seen = {}, {}
  local names, tokens, fracs, was_burst, was_n, was_p = {}, {}, {}, {}, {}, {}
  local absent, changed, failed, invalid = {}, {}, {}, {}
  local obst, on, op = {}, {}, {} -- the other shapes
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
        local held, frac, burst, n, p, back, other, other_n, other_p = load(raw, now)
        if held then
          tokens[b], fracs[b], was_burst[b], was_n[b], was_p[b], changed[b] = held, frac, burst, n, p, back
          if other then
            obst[b], on[b], op[b] = other, other_n, other_p
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
      if invalid[b] then
        tokens[b], fracs[b], was_burst[b], was_n[b], was_p[b], changed[b] = 0, 0, bursts[i], ns[i], ps[i], true
      end
    end
    of[i] = b
  end

  -- Decide, request by request. A denied take does not store the level that it
  -- found, or the rounding would add up, unless the clock went back or the shape
  -- changed: the bucket would then stand still, or refill at its old rate.
  local flags, held, parts = {}, {}, {}
  local first, all = 1, true
  for i = 1, count do
    local b, hold = of[i], holds[i] % 4
    local flag = 0
    if failed[b] then
      all = all and hold ~= 0
    else
      local n, p, burst = ns[i], ps[i], bursts[i]
      if absent[b] then -- full, whatever its shape
        tokens[b], fracs[b], was_burst[b], was_n[b], was_p[b] = burst, 0, burst, n, p
      elseif was_p[b] ~= p or was_n[b] ~= n or was_burst[b] ~= burst then
        if obst[b] or tokens[b] < was_burst[b] then
          obst[b], on[b], op[b] = other_for(was_burst[b], was_n[b], was_p[b], obst[b], on[b], op[b], burst, n, p)
        end
        tokens[b], fracs[b] = convert(tokens[b], fracs[b], was_p[b], burst, p)
        was_burst[b], was_n[b], was_p[b], changed[b] = burst, n, p, true
      end
      held[i], parts[i] = tokens[b], fracs[b]
      if invalid[b] then
        flag, invalid[b] = 4, nil
      end
      if held[i] >= costs[i] then
        flag = flag + 1
      elseif hold ~= 2 then
        all = false
      end
    end
    flags[i] = flag
    if holds[i] >= 4 then -- the request's last: all of its verdicts are known
      for j = first, i do
        if flags[j] % 2 == 1 and (all or holds[j] % 4 == 2) then
          flags[j] = flags[j] + 2
          if costs[j] > 0 then
            b = of[j]
            tokens[b], changed[b], absent[b] = tokens[b] - costs[j], true, nil
          end
        end
      end
      first, all = i + 1, true
    end
  end

  for b = 1, buckets do
    if changed[b] then
      local done = store(names[b], tokens[b], fracs[b], now, was_burst[b], was_n[b], was_p[b], obst[b], on[b], op[b])
      if done.err then -- the buckets before it stay charged: tokens are lost, never granted twice
        failed[b] = code(done.err)
      end
    end
  end

  local reply = {}
  for i = 1, count do
    local why = failed[of[i]]
    if why then
      reply[i] = struct.pack('>Bc10', 8, string.sub(why .. '          ', 1, 10))
    else
      reply[i] = struct.pack('>BI4I6', flags[i], held[i], parts[i])
    end
  end
  return struct.pack('>I7', now) .. table.concat(reply)
end

-- refund puts back what a request took from these buckets, because another bucket
-- then denied the request. To put back the whole cost would break the bound: the
-- bucket has refilled since the take, and if it had been full those tokens would
-- have been lost. So it puts back the cost less what refilled since the take, and
-- nothing if the clock went back. An absent bucket is full and stays absent.
local function refund(now)
  if #ARGV ~= #KEYS then
    return redis.error_reply('SLUICE one argument for each key')
  end
  for i = 1, #KEYS do
    if #ARGV[i] ~= REFUND_SIZE then
      return redis.error_reply('SLUICE an argument is not ' .. REFUND_SIZE .. ' bytes')
    end
    local n, p, burst, cost, at = struct.unpack(REFUND, ARGV[i])
    if not shape_ok(burst, n, p) or cost > burst then
      return redis.error_reply('SLUICE an argument is out of range')
    end
    if now >= at then
      local tokens, frac = refill(0, 0, now - at, cost, n, p) -- of the cost, what refilled since
      tokens, frac = cost - tokens, -frac
      if frac < 0 then
        tokens, frac = tokens - 1, frac + p
      end
      local raw = redis.pcall('GET', KEYS[i])
      if (tokens > 0 or frac > 0) and type(raw) == 'string' then
        local held, part, old_burst, old_n, old_p, _, obst, on, op = load(raw, now)
        if held then
          if old_p ~= p or old_n ~= n or old_burst ~= burst then
            if obst or held < old_burst then
              obst, on, op = other_for(old_burst, old_n, old_p, obst, on, op, burst, n, p)
            end
            held, part = convert(held, part, old_p, burst, p)
          end
          tokens, frac = held + tokens, part + frac
          if frac >= p then
            tokens, frac = tokens + 1, frac - p
          end
          if tokens >= burst then
            tokens, frac = burst, 0
          end
          store(KEYS[i], tokens, frac, now, burst, n, p, obst, on, op)
        end
      end
    end
  end
  return ''
end

