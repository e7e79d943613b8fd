#!lua
-- Takes: draws each request's costs from its buckets, from all of them or from none. One call carries the takes of many requests, one
-- after another: each sees what those before it left, and a bucket that several draw from is read once and written once.
--
-- The shebang has no flags, so Redis refuses the whole script, before its first line, where it could not write: out of
-- memory, a read-only replica, too few replicas, a failed save.
--
-- KEYS are the charges' buckets, request by request; several requests may name the same one, a request names each once. ARGV[1] has
-- one packed charge after another: the limit's rate (n tokens each p microseconds) and burst, the cost in tokens, and one byte: what holds
-- the request's others back (0 a denial or trouble of this bucket, 1 a denial only, 2 nothing: a shadow limit, which is taken by
-- itself), and 4 more where the charge is its request's last.
-- The reply is one string: the instant (7 bytes), and for each charge in turn 11 bytes: flags (1 allowed, 2 taken, 4 what was stored made
-- no sense, 8 trouble), then the tokens before the take, whole (4 bytes) and p-ths of one (6 bytes), or the first ten bytes of the trouble's code.
--
-- All numbers are doubles, exact up to 2^53. The bounds, as the arguments and the stored states are held to them:
-- n <= 1e15 < 2^50, p < 2^45, tokens and burst <= 1e9 < 2^30, now < 2^53. The arithmetic is bucket.go's, line by line.

local MAGIC = '\181\8'
-- Version 1: magic, version, tokens, p-ths of a token, instant in microseconds, burst, n, p: 37 bytes, which with a key of
-- ordinary length Redis still keeps in one allocation. Whatever a later version changes, magic and version stay.
local STATE, STATE_SIZE = '>c2BI4I6I7I4I7I6', 37
-- Version 2 has another shape behind it (burst, n, p): bucket.go says which. It is written only where there is one.
local MIXED, MIXED_SIZE = '>c2BI4I6I7I4I7I6I4I7I6', 54
local CHARGE, CHARGE_SIZE = '>I7I6I4I4B', 22
-- A refund is a charge with the instant of its take in the place of hold.
local REFUND, REFUND_SIZE = '>I7I6I4I4I7', 28

local MAX_N, MIN_P, MAX_P, MAX_TOKENS, MAX_TIME = 1e15, 1e6, 31622400000000, 1e9, 2^53
-- Milliseconds that a bucket is kept after it is full again: no rounding, and no lag between the clocks that Redis has for TIME and for
-- expiry, may end one that is not full.
local SLACK = 5000

-- muldiv returns floor(x*y/d) and the remainder, for x < d. Where x*y is below 2^53 plain division is exact: the quotient
-- is k - j/d for an integer k, at least 1/d below k, and a double rounds it up to k only where k*d > 2^53.
-- Else y is taken in eight limbs of 7 bits, from the top: r*128 and x*limb are below 2^45 * 2^7 = 2^52 each, so their sum
-- is below 2^53 and its division again exact; q stays at most the final quotient, which is below y.
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

-- fill_from returns about how many microseconds a shape takes to be full from so many tokens.
local function fill_from(tokens, burst, n, p)
  return math.min(math.max(0, burst - tokens) * p / n, MAX_FILL)
end

-- covers reports whether the first shape, from every level, is full no earlier than the second.
local function covers(burst, n, p, obst, on, op)
  return obst <= burst and fill_from(0, obst, on, op) <= fill_from(0, burst, n, p)
end

-- other_for returns the other shape (burst, n, p; or nil) to keep when a bucket that another shape used, not full in all of them, is used by
-- the shape of burst, n and p.
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

-- load reads what is stored of a bucket, and returns what it holds now in the shape that it was stored with: tokens, p-ths, burst, n, p,
-- whether that must be stored even if nothing is taken, as the clock went back, and the other shape, if there is one and the bucket is not
-- full in both. Of a newer version it returns nil, of what makes no sense nothing at all: it then counts as empty from now on.
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

-- convert returns a level of the period old_p as one of another shape: at most its burst, and rounded down.
local function convert(tokens, frac, old_p, burst, p)
  if tokens >= burst then
    return burst, 0
  end
  frac = muldiv(frac, p, old_p)
  return tokens, frac
end

-- code is the first word of an error of Redis's. A command that the user may not run within a script has no word of its own.
local function code(err)
  if string.find(err, 'ACL failure in script', 1, true) or string.find(err, 'The user executing the script', 1, true) then
    return 'NOPERM'
  end
  return string.sub(string.match(err, '^%S*'), 1, 10)
end

-- store writes a bucket: one SET, which sets its value and its end together. It returns Redis's answer. obst may be nil.
local function store(key, tokens, frac, now, burst, n, p, obst, on, op)
  -- A float's error in the microseconds until the bucket is full is far below the slack.
  local full = math.ceil(((burst - tokens) * p - frac) / n / 1000)
  local value
  if obst then
    full = math.max(full, math.ceil(fill_from(tokens, obst, on, op) / 1000))
    value = struct.pack(MIXED, MAGIC, 2, tokens, frac, now, burst, n, p, obst, on, op)
  else
    value = struct.pack(STATE, MAGIC, 1, tokens, frac, now, burst, n, p)
  end
  return redis.pcall('SET', key, value, 'PX', string.format('%.0f', full + SLACK))
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
  local names, tokens, fracs, was_burst, was_n, was_p, absent, changed, trouble, nonsense = {}, {}, {}, {}, {}, {}, {}, {}, {}, {}
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
          trouble[b] = 'NEWER'
        else
          nonsense[b] = true
        end
      elseif string.sub(raw.err, 1, 9) == 'WRONGTYPE' then
        nonsense[b] = true
      else
        trouble[b] = code(raw.err)
      end
      if nonsense[b] then
        tokens[b], fracs[b], was_burst[b], was_n[b], was_p[b], changed[b] = 0, 0, bursts[i], ns[i], ps[i], true
      end
    end
    of[i] = b
  end

  -- Decide, request by request. What a denied take finds is not stored, or rounding would add up; but of a bucket whose clock went back or
  -- whose shape changed, which would else stand still, or refill at its old rate.
  local flags, held, parts = {}, {}, {}
  local first, all = 1, true
  for i = 1, count do
    local b, hold = of[i], holds[i] % 4
    local flag = 0
    if trouble[b] then
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
      if nonsense[b] then
        flag, nonsense[b] = 4, nil
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
        trouble[b] = code(done.err)
      end
    end
  end

  local reply = {}
  for i = 1, count do
    local why = trouble[of[i]]
    if why then
      reply[i] = struct.pack('>Bc10', 8, string.sub(why .. '          ', 1, 10))
    else
      reply[i] = struct.pack('>BI4I6', flags[i], held[i], parts[i])
    end
  end
  return struct.pack('>I7', now) .. table.concat(reply)
end

-- refund puts back what a request took from these buckets and then did not need, as another node's bucket denied it. Put back whole it
-- would break the bound: meanwhile the bucket refilled, and had it been full it would have lost what came. So what refilled since the
-- take is kept back; where the clock went back, all of it. An absent bucket is full.
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

